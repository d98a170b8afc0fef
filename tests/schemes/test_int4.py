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


def nearest(fours: torch.Tensor, symmetric: bool, full_range: bool) -> torch.Tensor:
    """float64 [N, G, group] -> each number at the nearest of the levels that the whole range of its group has."""
    made = torch.empty_like(fours)
    for row, groups in enumerate(fours):
        for at, group in enumerate(groups):
            largest = group[group.abs().argmax()]
            low, high = group.min().clamp(max=0), group.max().clamp(min=0)
            step = largest / -8 if full_range else largest.abs() / 7
            levels = torch.arange(-8, 8).double() * step
            if not symmetric:
                step = (high - low) / 15
                levels = (torch.arange(16).double() - (-low / step).nan_to_num().round()) * step
            made[row, at] = levels[(group[:, None] - levels).abs().argmin(-1)]
    return made


@settings(max_examples=40)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from(int4.GROUPS), st.sampled_from(DTYPES),
       st.booleans(), st.booleans(), seeds)  # fmt: skip
def test_int4_is_at_least_as_near_as_rounding_the_whole_range(sizes, group, dtype, symmetric, full_range, seed):
    rows, groups = sizes
    weight = normal(rows, groups * group, seed=seed, dtype=dtype) * (seed % 3)  # also zeros
    weight = weight + (seed % 2) * 0.5
    packed, scale, zero = int4.quantize_weight(weight, group, symmetric, full_range)
    assert packed.shape == (rows, groups * group // 2) and packed.dtype == torch.uint8
    assert scale.shape == (rows, groups) and (scale != 0).all() and ((scale > 0).all() or (symmetric and full_range))
    assert scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert zero is None if symmetric else (zero.shape == scale.shape and zero.dtype == torch.uint8 and (zero <= 15).all())
    fours = weight.double().unflatten(1, (-1, group))
    error = int4.dequantize(packed, scale, zero, group).double().unflatten(1, (-1, group)) - fours
    # A bfloat16 scale is off by 1/256 at most, and a zero point that was rounded with another scale by one step.
    slack = fours.abs().amax(-1) * group**0.5 * (1 / 15 if dtype == torch.bfloat16 else 1e-6)
    assert (error.norm(dim=-1) <= (nearest(fours, symmetric, full_range) - fours).norm(dim=-1) + slack).all()


def test_all_sixteen_levels_are_used_whatever_the_sign_of_the_largest_number_unless_the_range_is_not_full():
    levels = (torch.arange(32) % 16 - 8) / 8.0
    weight = torch.stack([levels, -2 * levels])
    packed, scale, _ = int4.quantize_weight(weight, 32, True)
    assert scale.tolist() == [[0.125], [-0.25]] and int4.unpack(packed)[1].tolist() == list(range(16)) * 2
    assert torch.equal(int4.dequantize(packed, scale, None, 32), weight)
    _, scale, _ = int4.quantize_weight(weight, 32, True, full_range=False)
    assert (scale > 0).all()


def test_int4_cuts_outliers_off_where_that_is_nearer():
    weight = normal(1, 128)
    weight[0, 5] = 6.0
    packed, scale, _ = int4.quantize_weight(weight, 128, True)
    plain = (weight / (6 / 8)).round().clamp(-7, 8) * (6 / 8)
    assert 0 < -scale.item() < 6 / 8
    assert (int4.dequantize(packed, scale, None, 128) - weight).norm() < 0.95 * (plain - weight).norm()
