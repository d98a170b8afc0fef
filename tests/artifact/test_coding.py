import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.artifact.coding import LARGEST, coded, expanded
from fxc.errors import InputRefused
from fxc.ir.text import DTYPES


def same(one, other):
    bits = [each.contiguous().flatten().view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def again(tensor):
    made = coded(tensor)
    return None if made is None else expanded(made, tensor.dtype, tuple(tensor.shape))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([dtype for dtype in DTYPES.values() if dtype not in (torch.bool,)]),
    st.lists(st.integers(1, 9), min_size=0, max_size=4),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(1, 400),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_what_is_read_is_what_was_written_to_the_bit(dtype, shape, share, values, large, seed):
    shape = [*shape, 500] if large else shape
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    table = rng.integers(0, 256, (values, size), dtype=np.uint8)
    numbers = table[rng.integers(0, values, shape)] * (rng.random(shape) < share)[..., None].astype(np.uint8)
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)).view(dtype).reshape(shape)
    found = again(tensor)
    assert found is None or same(found, tensor)
    if large and share <= 0.1 and size > 1:
        assert found is not None


def test_pruned_and_clustered_weights_take_about_their_entropy():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(32, generator=generator)
    keep = torch.rand(300, 400, generator=generator) < 0.1
    weight = torch.where(keep, book[torch.randint(32, (300, 400), generator=generator)], 0.0)
    places = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9))
    assert len(coded(weight)) < 1.04 * weight.numel() * (places + 0.1 * 5) / 8 + 200
    assert same(again(weight), weight)


def test_columns_that_are_zero_are_cheap():
    dead = torch.randn(300, 64) * (torch.arange(64) < 6)
    spread = dead.flatten()[torch.randperm(dead.numel())].view(300, 64)
    assert len(coded(dead)) < 0.9 * len(coded(spread))
    assert same(again(dead), dead)


def test_packed_weights_are_coded_too_and_what_does_not_shrink_is_not():
    qweight = (torch.randn(100, 200) * 20).to(torch.int8)
    assert len(coded(qweight)) < 0.9 * qweight.numel()
    assert coded(torch.randint(256, (100, 200), dtype=torch.uint8)) is None
    assert coded(torch.empty(0, 3)) is None and coded(torch.tensor(1.0)) is None


def test_a_layout_that_the_begin_suggests_serves_the_whole():
    weight = torch.randn(3000, 700)
    weight[:2000] = weight[0, 0]
    assert same(again(weight), weight), "of few values to begin with, and of many in the end"


@pytest.mark.fault(33)
def test_no_file_asks_for_more_memory_than_it_has_bytes_for():
    zeros = torch.zeros(4000, 1000)
    made = coded(zeros)
    assert len(made) >= (zeros.nbytes - 4096) // LARGEST and same(again(zeros), zeros)
    with pytest.raises(InputRefused, match="cannot be so large"):
        expanded(made, torch.float32, (40000, 1000))


def test_damage_is_refused_in_words_wherever_it_is():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32)[torch.randint(32, (40, 60), generator=generator)] * (torch.rand(40, 60, generator=generator) < 0.2)
    made = coded(weight)
    refused = 0
    for at in range(len(made)):
        for change in (1, 128, 255):
            bad = made.clone()
            bad[at] ^= change
            try:
                found = expanded(bad, weight.dtype, (40, 60))
            except InputRefused as error:
                refused += "damaged" in error.what
            else:
                assert found.shape == (40, 60)
    assert refused > 300, "the hash of the file finds the others"
    for cut in (0, 1, 9, len(made) // 2):
        with pytest.raises(InputRefused):
            expanded(made[:cut], weight.dtype, (40, 60))
    for shape in ((40, 61), (39, 60), (0, 60)):
        with pytest.raises(InputRefused):
            expanded(made, weight.dtype, shape)
    with pytest.raises(InputRefused):
        expanded(made, torch.float64, (40, 60))
