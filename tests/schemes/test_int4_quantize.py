"""Rounding to 4, 3 and 2 bits in C++ gives the bits that the definition in torch gives, at every level that this CPU has."""

import itertools

import pytest
import torch

from fxc.errors import InputRefused
from fxc.schemes import int4
from fxc_kernels.cpu import native, native_int4_quantize

HERE = [name for name, (_, needs) in native.LEVELS.items() if set(needs.split()) <= native._abilities()]


@pytest.fixture(params=HERE or ["none"])
def level(request, monkeypatch):
    monkeypatch.setenv("FXC_CPU_LEVEL", request.param)
    if reason := native_int4_quantize.why_not():
        pytest.skip(f"no kernel here: {reason}")


def defined(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setenv("FXC_CPU_LEVEL", "none")
        return int4.quantize_weight(*arguments)


def weight(columns=256):
    """Rows of every kind: zeros, of one sign, equal, tiny, huge, with the largest number twice and of both signs, halfway
    between levels."""
    torch.manual_seed(0)
    made = torch.randn(40, columns) * torch.randn(40, 1).exp()
    made[3], made[4], made[5] = 0, made[4].abs(), -made[5].abs()
    made[6] *= 1e-35
    made[7, : columns // 2], made[8] = 0.5, made[8] * 1e30
    made[9, 5], made[9, 9] = -made[9].abs().max() - 1, made[9].abs().max() + 1
    made[10] = made[10].clamp(-1, 1) * 3.3e38
    made[11] = (torch.arange(columns).remainder(16) - 7.5) / 8
    made[11, ::16] = -1
    made[12] = made[11].nextafter(made.new_tensor(9.0))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_it_is_the_definition_bit_for_bit(level, bits, dtype, monkeypatch):
    given = weight().to(dtype)
    for group, symmetric, full_range in itertools.product((32, 64, 128), (True, False), (True, False)):
        options = (group, symmetric, full_range, bits)
        for made, expected in zip(int4.quantize_weight(given, *options), defined(monkeypatch, given, *options), strict=True):
            assert (made is None) == (expected is None)
            assert made is None or (made.dtype == expected.dtype and torch.equal(made, expected)), options


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(level, number):
    given = weight()
    given[2, 7] = number
    with pytest.raises(InputRefused, match="NaN or Inf"):
        int4.quantize_weight(given, 32, True)


def test_rows_know_nothing_of_each_other(level):
    given = weight()
    whole = int4.SCHEME.pack(given, group=64, symmetric=True, full_range=True)
    rows = [int4.SCHEME.pack(each[None], group=64, symmetric=True, full_range=True) for each in given]
    assert all(torch.equal(tensor, torch.cat([row[part] for row in rows])) for part, tensor in whole.items())


@pytest.mark.fault(11)
def test_a_weight_that_is_not_contiguous_or_half(level, monkeypatch):
    for given in (weight().t().contiguous().t(), weight().clamp(-9e4, 9e4).half().nan_to_num()):
        found, expected = (f(given, 64, True) for f in (int4.quantize_weight, lambda *a: defined(monkeypatch, *a)))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
