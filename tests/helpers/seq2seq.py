"""Small models of an encoder with a decoder that write text, and what they are given."""

from __future__ import annotations

import functools

import torch
import transformers
from torch import Tensor, nn

_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "vocab_size": 96,
}  # fmt: skip
CONFIGS = {
    "t5": lambda: transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    ),
    "bart": lambda: transformers.BartConfig(**_BART, max_position_embeddings=64, forced_eos_token_id=None),
    "whisper": lambda: transformers.WhisperConfig(
        **_BART, num_mel_bins=8, max_source_positions=20, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}  # fmt: skip
CLASSES = {
    "t5": transformers.T5ForConditionalGeneration,
    "bart": transformers.BartForConditionalGeneration,
    "whisper": transformers.WhisperForConditionalGeneration,
}


@functools.cache
def built(name: str) -> nn.Module:
    """The model `name`, whose weights are so large that it does not say one token for ever."""
    torch.manual_seed(1)
    model = CLASSES[name](CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    """Two samples for the encoder, the first one shorter where it has a mask."""
    generator = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, 6:] = 0
    return {"input_ids": torch.randint(4, 96, (2, 11), generator=generator), "attention_mask": mask}


def greedy(model: nn.Module, name: str, **options: object) -> Tensor:
    """What a model writes, the original or a compiled one, by the loop that all models have."""
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return transformers.GenerationMixin.generate(model, **inputs_of(name), **options)
