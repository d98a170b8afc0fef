"""Inputs of a causal language model: one call as the next one after another, and as one over everything."""

import pytest
import torch
from calibrated import runs
from families import build

from fxc.data import decoder
from fxc.data.samples import drawn, sample_of_size, samples
from fxc.frontend.capture import capture
from fxc.ir.cache import positions_of


@pytest.fixture(scope="module")
def program():
    captured = capture(build("qwen2")[0], check=False)
    captured.metadata["positions"] = "mask"
    return captured


def test_a_call_after_another_sees_what_that_one_saw(program):
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    at_once = program.module()(*decoder.decoder_inputs(program, ids, mask))
    first = program.module()(*decoder.decoder_inputs(program, ids[:, :6], mask[:, :6]))
    rest = decoder.next_inputs(program, first, ids[:, 6:], mask, positions_of(mask, 3))
    assert [tuple(t.shape) for t in rest] == [(2, 3), (2, 9), (2, 3), *[(2, 2, 6, 16)] * 4]
    torch.testing.assert_close(program.module()(*rest)[0], at_once[0][:, 6:])


def test_positions_are_those_that_the_model_counts(program):
    mask = torch.tensor([[0, 0, 1]])
    for how, positions in (("mask", [[0, 0, 0]]), ("arange", [[0, 1, 2]])):
        told = program.copy()
        told.metadata["positions"] = how
        assert decoder.decoder_inputs(told, mask * 7, mask)[2].tolist() == positions


def test_random_inputs_are_those_of_their_size(program):
    cache = [(2, 16, torch.bfloat16), (1, 8, torch.float32)]
    ids, mask, positions, key, other = decoder.random_inputs(50, cache, 2, 4, 5)
    assert ids.shape == (2, 4) and int(ids.min()) >= 0 and int(ids.max()) < 50
    assert mask.tolist() == [[0] * 3 + [1] * 6, [1] * 9] and positions[:, 0].tolist() == [2, 5]
    assert (key.shape, key.dtype, other.shape) == ((2, 2, 5, 16), torch.bfloat16, (2, 1, 5, 8))
    assert torch.equal(decoder.random_inputs(50, cache, 2, 4, 5)[3], key)
    assert decoder.random_inputs(50, cache, 1, 4, 5)[1].all(), "a single row has no padding"


def test_the_cache_of_a_sample_is_one_that_the_program_filled(program):
    quiet = program.copy()
    quiet.constants["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(32, 64)
    quiet.constants["model.layers.0.self_attn.v_proj.bias"] = torch.zeros(32)
    ids, mask, positions, *cache = decoder.decoder_sample_after_itself(quiet, 2, 3, 6)
    assert not cache[1].any() and cache[3].any() and cache[1].shape == (2, 2, 6, 16)
    plain = decoder.decoder_sample(quiet, 2, 3, 6)
    assert plain[4].any() and all(torch.equal(a, b) for a, b in zip((ids, mask, positions), plain))


def test_a_program_writes_what_is_likely_to_it(program):
    sure = program.copy()
    sure.constants["lm_head.weight"] = sure.constants["lm_head.weight"] * 1e6
    texts = decoder.written(sure, 3, 9)
    likeliest = sure.module()(*decoder.decoder_inputs(sure, texts))[0].argmax(-1)
    assert texts.shape == (3, 9) and torch.equal(texts[:, 1:], likeliest[:, :-1])
    inputs = drawn(program, 4)
    assert [tuple(s[0].shape) for s in inputs] == [(1, 32)] * 4 and len({tuple(s[0][0].tolist()) for s in inputs}) == 4
    runs(program, inputs[:1])


def test_samples_of_a_size(program):
    ids, mask, positions, *cache = sample_of_size(program, 3, 12)
    assert ids.shape == mask.shape == positions.shape == (3, 12) and cache[0].shape == (3, 2, 0, 16)
    first = samples(program)[0][0]
    assert torch.equal(ids[:2, :7], first) and torch.equal(ids[2], ids[0]) and torch.equal(ids[:, 7:], ids[:, :5])
    encoder = capture(build("bert")[0], check=False)
    assert {tuple(t.shape) for t in sample_of_size(encoder, 4, 5)} == {(4, 5)}
    runs(encoder, [sample_of_size(encoder, 4, 5)])
