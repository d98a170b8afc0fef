"""A small decoder in many files, as a model larger than memory is."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from families import _DECODER
from tiny import byte_tokenizer


def in_shards(folder: Path) -> Path:
    """Four layers in bfloat16, in shards of 100 kB, with a tokenizer."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**_DECODER | {"num_hidden_layers": 4}, tie_word_embeddings=False)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
