"""generate() decodes one sequence over buffers of a fixed size where that gives the same bits, or says why it does not."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoders import DECODERS, compiled
from transformers import DynamicCache

import fxc
from fxc.compiled import generate
from fxc.compiled.model import compiled_model
from fxc.errors import UsageError
from fxc.lower.runnable import runnable
from fxc.runtime import static_cache
from fxc.runtime.decode_graph import decode_program
from fxc.runtime.static_cache import SlotCache
from fxc_kernels.cpu import native_attention

NEW = 24
needs_attention = pytest.mark.skipif(bool(native_attention.why_not()), reason="torch's own attention sums in another order")


def fresh(name: str, **options):
    """A model of the family that has generated nothing yet."""
    made = compiled(name)
    return compiled_model(made.program, made.record, config=made.config, files=made.files, **options)


def given(rows: int = 1, length: int = 11, new: int = NEW, **options) -> dict:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(3))
    tokens = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "do_sample": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tokens, **options}


QUICK = ("qwen2", "gpt2", "gemma2")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))
    for name in (*DECODERS, "bloom", "opt", "gptj", "llama4", "gpt_oss")
])  # fmt: skip
def test_the_same_tokens_whatever_the_cache(name):
    model = fresh(name)
    for options in ({}, {"do_sample": True}):
        found = []
        for static in (None, False):
            model.static_cache = static
            torch.manual_seed(0)
            found.append(model.generate(**given(**options)))
        assert torch.equal(*found)
    # It decoded over buffers, or knows why not.
    assert (model._decoder is None) is (model.why_growing is not None)
    assert model._decoder is None or [step.size for step in model._decoder.steps] == [(1, static_cache.CAPACITY)]


@needs_attention
def test_one_sequence_is_decoded_over_buffers():
    model = fresh("qwen2")
    model.generate(**given(new=generate.WORTH_A_STEP))
    assert model._decoder is not None and model.why_growing is None
    assert isinstance(model.new_cache(1), SlotCache)
    # What may be cut, or handed to any method, is a cache of transformers' own.
    assert isinstance(model.new_cache(), DynamicCache) and isinstance(model.new_cache(2), DynamicCache)
    expected = fresh("qwen2", static_cache=False).generate(**given())
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(each, expected) for each in pool.map(lambda _: model.generate(**given()), range(3)))


@needs_attention
def test_slots_far_beyond_the_sequence_are_not_read():
    model, seen = fresh("qwen2", static_cache=False), []
    expected = model.generate(**given(length=50))
    model.use_static_cache()._decoder.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape[1]))
    assert torch.equal(model.generate(**given(length=50)), expected)
    assert sorted(set(seen)) == [64, 128] and len(seen) == NEW - 1


@pytest.mark.parametrize("options", [
    {"rows": 2}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"new": generate.WORTH_A_STEP - 1},
    {"use_cache": False}, {"prompt_lookup_num_tokens": 2},
], ids=str)  # fmt: skip
def test_other_calls_grow_their_cache(options):
    model = fresh("qwen2")
    model.generate(**given(**options))
    assert model._decoder is None and model.why_growing is None


def test_a_cache_that_is_handed_out_or_brought_is_transformers_own():
    model = fresh("qwen2")
    made = model.generate(**given(), return_dict_in_generate=True)
    assert type(made.past_key_values) is DynamicCache
    model.generate(**given(), past_key_values=DynamicCache())
    assert model._decoder is None


def test_it_is_turned_off(tmp_path):
    model = fresh("qwen2").use_growing_cache()
    model.save(tmp_path / "lm")
    for each in (model, fxc.load(tmp_path / "lm", static_cache=False)):
        each.generate(**given())
        assert each._decoder is None and isinstance(each.new_cache(1), DynamicCache)


def test_a_model_that_cannot_says_why():
    model = fresh("mpt")
    model.generate(**given(use_cache=True))  # which its configuration does not
    assert model._decoder is None and "cannot decode over a static cache" in model.why_growing


def test_steps_that_round_otherwise_are_not_taken():
    model = fresh("qwen2")
    whole, step = model.lower(), runnable(decode_program(model.lowered), "cpu", "eager")

    class Other(torch.nn.Module):
        def forward(self, *inputs):
            (logits,) = step(*inputs)
            return (logits * (1 + 1e-5),)

    static_cache.check_step(whole, Other(), model.program, model.device)
    with pytest.raises(UsageError, match=r"logits differ by (.|\n)*the same bits are wanted"):
        static_cache.check_step(whole, Other(), model.program, model.device, is_exact=True)


@pytest.mark.parametrize("choice", [None, True, False])
def test_a_pickle_keeps_the_choice(choice):
    model = fresh("qwen2")
    if choice is not None:
        model = model.use_static_cache(32) if choice else model.use_growing_cache()
    again = pickle.loads(pickle.dumps(model))
    assert again.static_cache is choice
    assert torch.equal(again.generate(**given(rows=2)), model.generate(**given(rows=2)))
    assert [step.size for step in again._decoder.steps] == [(2, 32), (2, 64)] if choice else again._decoder is None


def test_a_short_table_of_positions_is_no_obstacle():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=40, n_positions=24, bos_token_id=0, eos_token_id=None)
    model = fxc.optimize(GPT2LMHeadModel(config).eval(), passes="", allow_noop=True)
    ids = torch.arange(1, 6)[None]
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=18, do_sample=False)
    assert made.shape == (1, 23) and model.why_growing
