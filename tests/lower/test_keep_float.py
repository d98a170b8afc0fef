"""Floats beside packed weights take no more memory than was allowed, and the layers that gain most by them have it."""

import pytest
import torch
from int8_programs import program_of
from lowered import on_cpu
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.lower import choose
from fxc.lower.candidates import FLOAT, INT8
from fxc.lower.choose import Choice
from fxc.lower.cpu import lower_cpu
from fxc.lower.keep_float import Wish, within
from fxc.report.lowering import describe

BOTH = {1: (3.0, 1.0), 16: (0.1, 1.0)}
"""Float is faster for few rows and int8 for many: a layer wants both."""


def wish(gain, both=3, floats=2, dense=2):
    """A layer of 2 bytes, 1 as int8, which is `gain` times as fast with a float copy as without."""
    return Wish([Choice(INT8, 4, "both", "r", gain), Choice(FLOAT, None, "float", "r", 0.9 * gain),
                 Choice(INT8, None, "int8", "r", 1.0)], [both, floats, 1], dense)  # fmt: skip


@pytest.mark.parametrize(
    ("keep_float", "names"),
    [
        (0, ["int8"] * 4),
        (0.24, ["int8"] * 4),
        (0.25, ["int8", "int8", "float", "int8"]),
        (0.5, ["int8", "int8", "both", "int8"]),
        (0.75, ["float", "int8", "both", "int8"]),
        (1, ["float", "int8", "both", "float"]),
    ],
)
def test_what_gains_most_for_its_bytes_has_the_memory(keep_float, names):
    wishes = [wish(2.0), wish(1.01), wish(4.0), wish(2.0)]
    found = within(wishes, keep_float)
    assert [each.name for each in found] == names
    held = sum(w.nbytes[[c.name for c in w.choices].index(each.name)] for w, each in zip(wishes, found, strict=True))
    assert held <= 4 + keep_float * 4
    for each in found:
        assert ("has no room for both" in each.reason) == (each.name != "both"), each.reason


def test_where_all_of_it_fits_every_layer_has_what_it_wants():
    wishes = [wish(2.0), *[Wish([Choice(INT8, None, "int8", "r", 1.0)], [1], 2)] * 2]
    assert [(each.name, each.reason) for each in within(wishes, 1)] == [("both", "r"), ("int8", "r"), ("int8", "r")]
    only = Wish([Choice(FLOAT, None, "float", "r")], [2], 2)
    assert within([only], 0) == [only.choices[0]], "what has no other form is in floats whatever it takes"
    assert within([], 0.5) == []


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    return program_of(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), x), x


def held(program):
    return sum(each.numel() * each.element_size() for each in program.constants.values())


def test_a_lowered_program_never_holds_more_than_the_original(layers):
    program, _ = layers
    original, sizes = 8 * (64 * 64 + 64) * 4, []
    for keep_float in (0, 0.3, 0.6, 1):
        lowered, report = lower_cpu(program, measure=lambda *layer: BOTH, bf16=False, keep_float=keep_float)
        sizes.append(held(lowered))
        assert all(each.reason.startswith("keep_float=") == (each.op == "int8") for each in report)
    least = sizes[0]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert all(size <= least + share * (original - least) for size, share in zip(sizes, (0, 0.3, 0.6, 1), strict=True))
    assert sizes[-1] > 0.8 * original, "what is allowed is used"


def test_by_default_it_is_the_originals_memory_and_the_numbers_stay(layers):
    program, x = layers
    module, report = on_cpu(program, measure=lambda *layer: BOTH, bf16=False)
    assert {each.op for each in report} == {"int8", "int8 above M=1, float below"}
    assert torch.allclose(module(x)[0], program.module()(x)[0], atol=1e-4)
    (line,) = [line for line in describe(report) if line.startswith("keep_float=1 has no room for int8 above M=1")]
    assert line.endswith(f"as {next(each.fqn for each in report if each.op == 'int8')}")


def test_what_is_asked_for_is_checked(tmp_path):
    fxc.optimize(nn.Linear(64, 64), (torch.randn(2, 64),)).save(tmp_path / "a")
    assert fxc.load(tmp_path / "a", keep_float=0.1).keep_float == 0.1
    for wrong in (-0.1, 1.5, "0.1", True, float("nan")):
        with pytest.raises(UsageError, match="is not a share"):
            fxc.load(tmp_path / "a", keep_float=wrong)


def test_alternatives_are_what_is_wanted_and_what_takes_less():
    found = choose.alternatives((INT8, FLOAT), BOTH, True)
    assert [(each.form, each.limit) for each in found] == [(INT8, 1), (FLOAT, None), (INT8, None)]
    assert found[0].gain == max(each.gain for each in found)
    (only,) = choose.alternatives((INT8, FLOAT), {1: (0.1, 1.0), 16: (0.1, 1.0)}, True)
    assert (only.form, only.limit) == (INT8, None)
