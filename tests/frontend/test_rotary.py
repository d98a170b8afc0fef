"""Rotary embeddings whose frequencies follow the length of the sequence."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fxc

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def dynamic_llama():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    return transformers.LlamaForCausalLM(config).eval()


def longrope_phi3():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(**SIZES, **lengths, rope_parameters=rope)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [dynamic_llama, longrope_phi3])
def test_frequencies_that_follow_the_length_are_recomputed(build):
    torch.manual_seed(0)
    model = build()
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    compiled = fxc.optimize(model, passes="")
    assert {n: t.tolist() for n, t in model.named_buffers()} == {n: t.tolist() for n, t in buffers.items()}
    for length in (7, 16, 17, 40):
        ids = torch.randint(3, 128, (2, length))
        with torch.no_grad():  # the original remembers the longest that it has seen
            torch.testing.assert_close(compiled(input_ids=ids).logits, copy.deepcopy(model)(ids).logits)
    ids = torch.randint(3, 128, (1, 9))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(compiled.generate(ids, max_new_tokens=20, do_sample=False), expected)
