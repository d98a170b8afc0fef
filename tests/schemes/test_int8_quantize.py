"""Rounding to int8 in C++ gives the bits that the definition in torch gives, at every level that this CPU has."""

import pytest
import torch

from fxc.errors import InputRefused
from fxc.schemes import int8
from fxc_kernels.cpu import native, native_int8_quantize

HERE = [name for name, (_, needs) in native.LEVELS.items() if set(needs.split()) <= native._abilities()]


@pytest.fixture(params=HERE or ["none"])
def level(request, monkeypatch):
    monkeypatch.setenv("FXC_CPU_LEVEL", request.param)
    if reason := native_int8_quantize.why_not():
        pytest.skip(f"no kernel here: {reason}")


def defined(monkeypatch, given):
    with monkeypatch.context() as patch:
        patch.setenv("FXC_CPU_LEVEL", "none")
        return int8.quantize_weight(given)


def weight(columns):
    """Rows of every kind: zeros, tiny, huge, in the middle between two levels."""
    torch.manual_seed(0)
    made = torch.randn(40, columns) * torch.randn(40, 1).exp()
    made[3], made[6], made[8] = 0, made[6] * 1e-35, made[8] * 1e30
    made[9] = torch.arange(columns) % 127 + 0.5
    made[9, 0] = -127
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 300])
def test_it_is_the_definition_bit_for_bit(level, columns, dtype, monkeypatch):
    given = weight(columns).to(dtype)
    made, expected = int8.quantize_weight(given), defined(monkeypatch, given)
    assert torch.equal(made[0], expected[0]) and torch.equal(made[1], expected[1])
    assert made[0].dtype == torch.int8 and made[1].dtype == torch.float32


@pytest.mark.parametrize("at", [0, 7, 299])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(level, number, at):
    given = weight(300)
    given[2, at] = number
    with pytest.raises(InputRefused, match="NaN or Inf"):
        int8.quantize_weight(given)


def test_a_weight_that_is_not_contiguous_or_half(level, monkeypatch):
    for given in (weight(64).t(), weight(64).clamp(-9e4, 9e4).half().nan_to_num()):
        found, expected = int8.quantize_weight(given), defined(monkeypatch, given)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
