"""The cache of a decoder: which inputs and outputs of a program it is, and what goes with it.

A causal language model is one program for prefill and decode. For B rows, P tokens in the cache and N new ones:

    input_ids [B, N], attention_mask [B, P + N], position_ids [B, N]      int64
    past.LAYER.key, past.LAYER.value [B, heads, P, width]                 heads and width of each layer's own
    -> logits [B, N, vocabulary], present.LAYER.key, present.LAYER.value [B, heads, P + N, width]

What a call returns as present.X the next one is given as past.X. A pass may take heads out of it, or all of a layer's.

A model of an encoder and a decoder that writes text is one program too, of both. With S tokens, or frames, for the encoder:

    input_ids [B, S] or what else it reads, its masks, decoder_input_ids [B, N], past.LAYER.key, past.LAYER.value as above
    -> what the model returns, present.LAYER.key, present.LAYER.value

The cache is that of self-attention. Keys and values of what the encoder made are computed in every call of the whole;
`fxc.runtime.encoder_once` cuts the program in two, where they are what the first part gives the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.ir.program import Program

KIND = "causal_lm"
"""`Program.metadata["kind"]` of a causal language model."""

SEQ2SEQ = "seq2seq_lm"
"""The same of an encoder with a decoder that has a cache."""

_PAST, _PRESENT = "past.", "present."


def is_causal_lm(program: Program) -> bool:
    return program.metadata.get("kind") == KIND


def is_seq2seq(program: Program) -> bool:
    return program.metadata.get("kind") == SEQ2SEQ


def has_cache(program: Program) -> bool:
    return is_causal_lm(program) or is_seq2seq(program)


def is_of_encoder(name: str) -> bool:
    """Whether the input `name` of an encoder with a decoder is one that the encoder reads."""
    return not (is_past(name) or name.startswith("decoder_"))


def input_names(layers: int) -> list[str]:
    """The inputs of a causal language model, in order."""
    return ["input_ids", "attention_mask", "position_ids", *past_names(layers)]


def output_names(layers: int) -> list[str]:
    """The outputs of a causal language model, in order."""
    return ["logits", *present_names(layers)]


def past_names(layers: int) -> list[str]:
    """The inputs that are the cache, in order."""
    return _names(_PAST, layers)


def present_names(layers: int) -> list[str]:
    """The outputs that are the cache, in order."""
    return _names(_PRESENT, layers)


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def is_past(name: str) -> bool:
    """Whether the input `name` is one of the cache."""
    return name.startswith(_PAST)


def is_present(name: str) -> bool:
    """Whether the output `name` is one of the cache."""
    return name.startswith(_PRESENT)


def as_past(name: str) -> str:
    """The input that is given next what the output `name` returned; of what is no cache, the name itself."""
    return _PAST + name.removeprefix(_PRESENT) if is_present(name) else name


def as_present(name: str) -> str:
    """The output that returns what the input `name` is given next; of what is no cache, the name itself."""
    return _PRESENT + name.removeprefix(_PAST) if is_past(name) else name


def cache_pairs(program: Program) -> dict[str, tuple[int, int]]:
    """Name of a cache input -> (its index, the index of the output that it comes from)."""
    if not has_cache(program):
        return {}
    outputs = {name: o for o, name in enumerate(program.signature.outputs) if is_present(name)}
    inputs = {declared.name: i for i, declared in enumerate(program.signature.inputs) if is_past(declared.name)}
    return {name: (i, outputs[as_present(name)]) for name, i in inputs.items() if as_present(name) in outputs}


def cache_types(program: Program) -> list[Tensor]:
    """Of each cache input, in order, what stands for it: [B, heads, P, width], B and P symbols."""
    inputs = zip(program.placeholders, program.signature.inputs, strict=True)
    return [node.meta["val"] for node, declared in inputs if is_past(declared.name)]


def empty_cache(program: Program, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The cache inputs of `batch` rows before the first token: [batch, heads, 0, width] each."""
    return [torch.empty(batch, t.shape[1], 0, t.shape[3], dtype=t.dtype, device=device) for t in cache_types(program)]


def positions_of(mask: Tensor, new: int) -> Tensor:
    """The positions [B, new] of the last columns of `mask` [B, S], counted from the first token of each row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, mask.shape[1] - new :]


def default_positions(program: Program, mask: Tensor, new: int) -> Tensor:
    """The positions [B, new] that the original takes where it is given none: `positions_of` where the metadata's "positions" is
    "mask", and else counted from the first column of `mask` [B, S]."""
    if program.metadata.get("positions") == "mask":
        return positions_of(mask, new)
    batch, columns = mask.shape
    return torch.arange(columns - new, columns, device=mask.device).expand(batch, -1)
