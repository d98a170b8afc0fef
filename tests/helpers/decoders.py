"""Decoders of many families, compiled."""

from __future__ import annotations

from functools import cache

import torch
from families import _causal, build

import fxc

DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gpt2", "mixtral", "qwen3_moe")


def _others(name: str):
    """Families whose positions or masks are made differently."""
    import transformers

    small = {"vocab_size": 320, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(3)
    if name == "llama4":  # attention in chunks
        options = {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 128}
        return _causal("Llama4TextConfig", **options).eval()
    if name == "gpt_oss":  # sinks: a column more than keys, which is sliced off again
        options = {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}
        return _causal("GptOssConfig", **options).eval()
    config = {
        "bloom": lambda: transformers.BloomConfig(**small, n_layer=2, n_head=4),  # ALiBi, from the mask
        "opt": lambda: transformers.OPTConfig(  # learned positions, from the mask
            **small, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64
        ),
        "gptj": lambda: transformers.GPTJConfig(
            vocab_size=320, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=1, eos_token_id=2
        ),
        "mpt": lambda: transformers.MptConfig(vocab_size=320, d_model=64, n_layers=1, n_heads=4, max_seq_len=128),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@cache
def compiled(name: str):
    model = build(name)[0] if name in DECODERS else _others(name)
    made = fxc.optimize(model, passes="", verify=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name in made.program.constants:
            made.program.constants[name] = 4 * made.program.constants[name]  # so that attention is not nearly uniform
    return made
