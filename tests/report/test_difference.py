"""The difference of two programs' texts."""

from fxc.report.difference import unified_diff


def test_a_difference_ignores_numbers_and_sees_rewiring():
    before = "%0: f32[2] = input\n%1: f32[2] = aten.neg(%0)\n%2: f32[2] = aten.abs(%1)\nreturn %2"
    longer = "%0: f32[2] = input\n%1: f32[2] = aten.exp(%0)\n%2: f32[2] = aten.neg(%0)\n%3: f32[2] = aten.abs(%2)\nreturn %3"
    assert unified_diff(before, before, ("a", "b")) == ""
    changed = [line for line in unified_diff(before, longer, ("a", "b")).splitlines()[2:] if line[0] in "+-"]
    assert changed == ["+%+0: f32[2] = aten.exp(%0)"]
    rewired = before.replace("aten.abs(%1)", "aten.abs(%0)")
    changed = [line for line in unified_diff(before, rewired, ("a", "b")).splitlines()[2:] if line[0] in "+-"]
    assert changed == ["-%2: f32[2] = aten.abs(%1)", "+%2: f32[2] = aten.abs(%0)"]
