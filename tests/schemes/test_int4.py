"""int4: packing, and what rounding may cost."""

from __future__ import annotations

import torch
from formats import DTYPES, normal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.schemes import int4


@settings(max_examples=40)
@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_int4_packs_and_unpacks_exactly(values):
    packed = int4.pack(torch.tensor([values, values[::-1]], dtype=torch.uint8))
    assert packed.shape == (2, len(values) // 2)
    assert packed[0].tolist() == [low + 16 * high for low, high in zip(values[::2], values[1::2])]
    assert int4.unpack(packed).tolist() == [values, values[::-1]]


def test_every_byte_is_two_int4_values():
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(int4.pack(int4.unpack(every)), every)
    picture = torch.tensor([[3, 15, 8, 0, 7, 9, 8, 12]], dtype=torch.uint8)
    assert int4.pack(picture).tolist() == [[0xF3, 0x08, 0x97, 0xC8]]


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(int4.GROUPS), st.sampled_from(DTYPES), st.booleans(), seeds)
def test_int4_is_at_least_as_near_as_rounding_the_whole_range(rows, groups, group, dtype, symmetric, seed):
    weight = normal(rows, groups * group, seed=seed, dtype=dtype) * (seed % 3)  # also zeros
    weight = weight + (seed % 2) * 0.5
    packed, scale, zero = int4.quantize_weight(weight, group, symmetric)
    assert packed.shape == (rows, groups * group // 2) and packed.dtype == torch.uint8
    assert scale.shape == (rows, groups) and (scale > 0).all()
    assert scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert zero is None if symmetric else (zero.shape == scale.shape and zero.dtype == torch.uint8 and (zero <= 15).all())
    error = int4.dequantize(packed, scale, zero, group).double() - weight.double()
    fours = weight.double().unflatten(1, (-1, group))
    if symmetric:
        step = fours.abs().amax(-1, keepdim=True) / 7
    else:
        step = (fours.amax(-1, keepdim=True).clamp(min=0) - fours.amin(-1, keepdim=True).clamp(max=0)) / 15
    # Half a step for the value, asymmetric half a one more for the zero point; a bfloat16 scale is off by 1/256 at most.
    bound = step * (0.5 if symmetric else 1.0) + step * 15 / 256 * (dtype == torch.bfloat16)
    assert (error.unflatten(1, (-1, group)).square().sum(-1) <= (group * bound.square()).squeeze(-1) * 1.001 + 1e-12).all()


def test_int4_cuts_outliers_off_where_that_is_nearer():
    weight = normal(1, 128)
    weight[0, 5] = 6.0
    packed, scale, _ = int4.quantize_weight(weight, 128, True)
    plain = (weight / (6 / 7)).round().clamp(-8, 7) * (6 / 7)
    assert scale.item() < 6 / 7
    assert (int4.dequantize(packed, scale, None, 128) - weight).norm() < 0.95 * (plain - weight).norm()
