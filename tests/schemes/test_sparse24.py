"""2:4 sparse: packing, and which two of four stay."""

from __future__ import annotations

import pytest
import torch
from formats import DTYPES, normal, seeds, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.schemes import sparse24


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([*DTYPES, torch.int8]), st.floats(0, 1), seeds)
def test_sparse24_packs_and_unpacks_exactly(rows, eights, dtype, share, seed):
    matrix = (100 * sparse(rows, 8 * eights, seed, share)).to(dtype)
    values, meta = sparse24.pack(matrix)
    assert (values.shape, values.dtype) == ((rows, 4 * eights), dtype) and meta.shape == (rows, eights)
    assert torch.equal(sparse24.unpack(values, meta), matrix)
    places = sparse24.unpack_positions(meta)
    assert (places[..., 0] < places[..., 1]).all()
    # One bit at a time, as the picture says.
    for r in range(rows):
        row = [0.0] * (8 * eights)
        for i, value in enumerate(values[r].tolist()):
            row[4 * (i // 2) + (int(meta[r, i // 4]) >> 2 * (i % 4) & 3)] = value
        assert row == matrix[r].tolist()


def test_the_picture_of_sparse24():
    values, meta = sparse24.pack(torch.tensor([[0.5, 0, 0, -2, 0, 1, 0, 0]]))
    assert values.tolist() == [[0.5, -2, 0, 1]] and meta.tolist() == [[0b01_00_11_00]]


@pytest.mark.fault(13)
@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from(DTYPES), seeds)
def test_the_two_largest_of_four_stay(rows, eights, dtype, seed):
    weight = normal(rows, 8 * eights, seed=seed, dtype=dtype).mul(3).round()  # with equals among them
    masked = sparse24.mask_by_magnitude(weight)
    for four, kept in zip(weight.reshape(-1, 4).tolist(), masked.reshape(-1, 4).tolist()):
        stay = sorted(sorted(range(4), key=lambda i: (-abs(four[i]), i))[:2])
        assert kept == [value if i in stay else 0 for i, value in enumerate(four)]
    assert torch.equal(sparse24.mask_by_magnitude(masked), masked)


@pytest.mark.fault(13)
def test_minus_zero_is_zero():
    row = torch.tensor([[-0.0, 1.0, -0.0, 2.0, 0.0, -0.0, -0.0, 3.0]])
    values, meta = sparse24.pack(row)
    assert torch.equal(sparse24.unpack(values, meta), row) and int((values != 0).sum()) == 3
    assert torch.equal(sparse24.mask_by_magnitude(row), row)
