"""A lowered program is a program: it has types and a text and is checked; and it is none that an artifact may hold."""

import pytest
import torch
from int8_programs import int8_wins, program_of
from torch import nn

from fxc.artifact import store
from fxc.errors import InputRefused, VerificationFailed
from fxc.ir import check, parse_program, print_program
from fxc.lower.cpu import lower_cpu

TEXT = """\
constant @lowered.0.bias: f32[48]
constant @lowered.0.scale: f32[48]
constant @lowered.0.weight: i8[32, 48] packed by oneDNN
constant @lowered.0.zero_point: i32[48]
constant @lowered.0.zero_point_term: f32[1, 48]
%0: f32[s0, s1, 32] = input "x"
%1: f32[s0, s1, 48] = fxc_cpu.int8_linear(%0, @lowered.0.weight, @lowered.0.scale, @lowered.0.zero_point, \
@lowered.0.zero_point_term, @lowered.0.bias, "gelu")  # 0 (lower)
return "out0" %1
"""


@pytest.fixture(params=["eager", "inductor"])
def lowered(request):
    program = program_of(nn.Sequential(nn.Linear(32, 48), nn.GELU()), torch.randn(2, 9, 32))
    program.signature.call = {"args": [0], "kwargs": {}}
    program.signature.result = 0
    return lower_cpu(program, request.param, measure=int8_wins, bf16=False)[0]


@pytest.mark.parametrize("lowered", ["eager"], indirect=True)
def test_it_prints_as_text(lowered):
    assert print_program(lowered).partition("symbol s1 = 9\n")[2] == TEXT


def test_it_is_checked_as_what_it_is(lowered):
    check(lowered, lowered=True)
    with pytest.raises(VerificationFailed, match="namespace 'fxc_cpu'"):
        check(lowered)
    next(n for n in lowered.graph.nodes if n.op == "call_function").meta["val"] = None
    with pytest.raises(VerificationFailed, match="has no type"):
        check(lowered, lowered=True)


def test_no_text_with_operators_of_a_device_is_read(lowered):
    text = print_program(lowered)
    with pytest.raises(InputRefused):
        parse_program(text)
    with pytest.raises(InputRefused, match="not on the list of allowed operators") as refused:
        parse_program(text.replace(" packed by oneDNN", ""))
    assert "fxc_cpu." in str(refused.value.why)


def test_no_artifact_holds_one(lowered, tmp_path):
    with pytest.raises(VerificationFailed):
        store.save(lowered, tmp_path / "out", manifest={})
    assert not (tmp_path / "out").exists()
