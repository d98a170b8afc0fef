"""int4: packing, and what rounding may cost."""

from __future__ import annotations

import pytest
import torch
from formats import DTYPES, generator, normal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.errors import InputRefused
from fxc.schemes import int4


@settings(max_examples=40)
@given(st.sampled_from([4, 3, 2]), st.integers(1, 8), seeds)
def test_numbers_are_packed_and_unpacked_exactly(bits, units, seed):
    values = torch.randint(0, 2**bits, (2, 8 * units), generator=generator(seed), dtype=torch.uint8)
    packed = int4.pack(values, bits)
    assert packed.shape == (2, bits * units) and torch.equal(int4.unpack(packed, bits), values)
    streams = [sum(q << bits * k for k, q in enumerate(row)) for row in values.tolist()]
    assert [int.from_bytes(bytes(row), "little") for row in packed.tolist()] == streams


def test_every_byte_is_two_int4_values():
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(int4.pack(int4.unpack(every)), every)
    picture = torch.tensor([[3, 15, 8, 0, 7, 9, 8, 12]], dtype=torch.uint8)
    assert int4.pack(picture).tolist() == [[0xF3, 0x08, 0x97, 0xC8]]


@pytest.mark.parametrize(("bits", "numbers"), [(4, "an even number"), (3, "a multiple of 8"), (2, "a multiple of 4")])
def test_what_bits_do_not_hold_is_refused(bits, numbers):
    with pytest.raises(InputRefused, match=f"only {numbers} of uint8"):
        int4.pack(torch.zeros(1, 9, dtype=torch.uint8), bits)
    with pytest.raises(InputRefused, match=f"{bits} bits hold 0 to {2**bits - 1}"):
        int4.pack(torch.full((1, 8), 2**bits, dtype=torch.uint8), bits)


def nearest(fours: torch.Tensor, symmetric: bool, full_range: bool, bits: int) -> torch.Tensor:
    """float64 [N, G, group] -> each number at the nearest of the levels that the whole range of its group has."""
    made, middle, steps = torch.empty_like(fours), 2 ** (bits - 1), 2**bits - 1
    for row, groups in enumerate(fours):
        for at, group in enumerate(groups):
            largest = group[group.abs().argmax()]
            low, high = group.min().clamp(max=0), group.max().clamp(min=0)
            step = largest / -middle if full_range else largest.abs() / (middle - 1)
            levels = torch.arange(-middle, middle).double() * step
            if not symmetric:
                step = (high - low) / steps
                levels = (torch.arange(steps + 1).double() - (-low / step).nan_to_num().round()) * step
            made[row, at] = levels[(group[:, None] - levels).abs().argmin(-1)]
    return made


@settings(max_examples=40)
@given(st.sampled_from([4, 3, 2]), st.sampled_from(int4.GROUPS), st.sampled_from(DTYPES), st.booleans(), st.booleans(), seeds)
def test_it_is_at_least_as_near_as_rounding_the_whole_range(bits, group, dtype, symmetric, full_range, seed):
    rows, groups = 1 + seed % 3, 1 + seed % 2
    weight = normal(rows, groups * group, seed=seed, dtype=dtype) * (seed % 3)  # also zeros
    weight = weight + (seed % 2) * 0.5
    packed, scale, zero = int4.quantize_weight(weight, group, symmetric, full_range, bits)
    assert packed.shape == (rows, groups * group * bits // 8) and packed.dtype == torch.uint8
    assert scale.shape == (rows, groups) and (scale != 0).all() and ((scale > 0).all() or (symmetric and full_range))
    assert scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert zero is None if symmetric else (zero.shape == scale.shape and zero.dtype == torch.uint8 and (zero < 2**bits).all())
    fours = weight.double().unflatten(1, (-1, group))
    error = int4.dequantize(packed, scale, zero, group, bits).double().unflatten(1, (-1, group)) - fours
    # A bfloat16 scale is off by 1/256 at most, and a zero point that was rounded with another scale by one step.
    slack = fours.abs().amax(-1) * group**0.5 * (1 / 15 if dtype == torch.bfloat16 else 1e-6)
    assert (error.norm(dim=-1) <= (nearest(fours, symmetric, full_range, bits) - fours).norm(dim=-1) + slack).all()


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
