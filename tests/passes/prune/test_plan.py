"""Decisions from outside: what is dropped by number and name."""

from __future__ import annotations

import json

import pytest
from pruned import Repeated, counts, masked, stack, three_layers, zero_columns
from removal import shapes, sliced

from fxc.errors import UsageError
from fxc.passes.base import Context, parse_passes
from fxc.passes.prune.plan import Drop, parse_drops, read_plan
from fxc.passes.prune.prune import Prune, with_drops


@pytest.mark.parametrize(
    ("text", "drops"),
    [
        ("model.layers.4", [Drop("model.layers.4")]),
        ("model.layers.3.self_attn:heads=0,5", [Drop("model.layers.3.self_attn", "heads", (0, 5))]),
        ("a/ffn/7+3+7", [Drop("a", "ffn", (3, 7))]),
        ("a:kv_heads=1; b.2 ;c:channels=0", [Drop("a", "kv_heads", (1,)), Drop("b.2"), Drop("c", "channels", (0,))]),
        ("", []),
    ],
)
def test_drops_are_read_and_written(text, drops):
    assert list(parse_drops(text)) == drops
    assert list(parse_drops(";".join(map(str, drops)))) == drops


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:heads", "does not say what to drop"),
        ("a:heads=", "does not say what to drop"),
        ("a:heads=x", "does not say what to drop"),
        ("a:heads=-1", "does not say what to drop"),
        ("a b", "does not say what to drop"),
        ("a:toes=1", "one of heads, kv_heads, ffn, channels"),
        ("a:heads=,", "a list of numbers"),
    ],
)
def test_drops_that_are_none(text, says):
    with pytest.raises(UsageError) as caught:
        parse_drops(text)
    assert says in str(caught.value)


def test_units_are_dropped_by_number():
    after, result = masked(three_layers(), "prune:drop=layers.1/ffn/0+7;layers.2/ffn/39")
    assert counts(result) == {"layers.1": (40, 2), "layers.2": (40, 1)}
    columns = [zero_columns(after.constants[f"layers.{i}.down.weight"]) for i in range(3)]
    assert columns == [[], [0, 7], [39]]


def test_heads_and_kv_heads_are_dropped_by_number():
    program = stack(Repeated(6, 2), Repeated(6, 2))
    after, _ = masked(program, "prune:drop=layers.0/heads/1+5;layers.1/kv_heads/0")
    assert zero_columns(after.constants["layers.0.o.weight"]) == [4, 5, 6, 7, 20, 21, 22, 23]
    assert zero_columns(after.constants["layers.1.o.weight"]) == list(range(12))
    small, _ = sliced(after)
    assert [shapes(small)[f"layers.{i}.k.weight"][0] for i in (0, 1)] == [8, 4]


def test_layers_are_dropped_by_name_beside_units_of_others():
    after, result = masked(three_layers(), "prune:drop=layers.0/ffn/3;layers.1")
    assert {(r.scope, r.kind) for r in result.removed} == {("layers.0", "ffn"), ("layers.1", "layer")}
    small, _ = sliced(after)
    assert shapes(small)["layers.0.up.weight"] == [39, 10] and "layers.1.up.weight" not in small.constants


def test_a_plan_is_a_file(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"drop": ["layers.1", {"module": "layers.0", "ffn": [4, 2]}, {"module": "layers.2"}]}))
    assert read_plan(plan) == (Drop("layers.1"), Drop("layers.0", "ffn", (2, 4)), Drop("layers.2"))
    plan.write_text(json.dumps({"drop": ["layers.1", {"module": "layers.0", "ffn": [4, 2]}]}))
    (step,) = with_drops([], ["layers.2:ffn=1"], str(plan))
    after = three_layers().copy()
    result = step.run(after, Context())
    assert {(r.scope, r.kind, r.removed) for r in result.removed} == {
        ("layers.0", "ffn", 2), ("layers.1", "layer", 1), ("layers.2", "ffn", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "an object with one list"),
        ('{"drop": {}}', "an object with one list"),
        ('{"drop": [], "more": 1}', "an object with one list"),
        ('{"drop": [3]}', "names no module"),
        ('{"drop": [{"ffn": [1]}]}', "names no module"),
        ('{"drop": [{"module": "a", "ffn": 1}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "ffn": [-1]}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "ffn": [true]}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "toes": [1]}]}', "one of heads"),
        ('{"drop": ["a:toes=1"]}', "one of heads"),
    ],
)
def test_plans_that_are_none(tmp_path, content, says):
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_plan(plan)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ("layers.7", "cannot be dropped as a whole"),
        ("layers.1.up", "cannot be dropped as a whole"),
        ("layers.7/ffn/0", "no groups of ffn are in it"),
        ("layers/ffn/0", "3 groups of ffn are in it"),
        ("layers.1/heads/0", "no groups of heads are in it"),
        ("layers.1/ffn/40", "it has ffn 0 to 39, not 40"),
        ("layers.1/ffn/" + "+".join(map(str, range(40))), "these are all of its 40 FFN channels"),
    ],
)
def test_what_cannot_be_dropped_says_why(drop, says):
    with pytest.raises(UsageError) as caught:
        masked(three_layers(), f"prune:drop={drop}")
    assert says in str(caught.value), str(caught.value)


def test_all_kv_heads_are_all_heads():
    program = stack(Repeated(6, 2), Repeated(6, 2))
    with pytest.raises(UsageError, match="these are all of its 6 heads"):
        masked(program, "prune:drop=layers.0/kv_heads/0+1")
    with pytest.raises(UsageError, match="it has kv_heads 0 to 1, not 2"):
        masked(program, "prune:drop=layers.0/kv_heads/2")


def test_drops_become_an_option_of_the_pass():
    (step, other) = with_drops(parse_passes("prune:ffn=0.1,int8"), ["a.3:heads=0,5", "b.4"], "")
    assert str(step) == "prune:ffn=0.1:drop=a.3/heads/0+5;b.4" and other.name == "int8"
    assert parse_passes(str(step)) == [step]
    assert [str(p) for p in with_drops(parse_passes("int8"), ["b.4"], "")] == ["prune:drop=b.4", "int8"]
    assert with_drops([step], [], "") == [step]
    assert str(Prune(drop="a.3:heads=0,5")) == "prune:drop=a.3/heads/0+5"
