"""Rotary embeddings whose frequencies follow the length of the sequence: as a function, without memory of earlier calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def functional_rotary(model: nn.Module) -> Iterator[None]:
    """While open, transformers' rotary embeddings of the types "longrope" and "dynamic" (NTK) compute their frequencies at
    every call of the positions that it is given, as a model does that was never called before, and write nothing."""
    with ExitStack() as stack:
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            kinds = kinds if isinstance(kinds, dict) else {None: kinds}
            if not any(_follows_length(kind) for kind in kinds.values()):
                continue
            inner = inspect.unwrap(type(module).forward)
            if inner is type(module).forward or not hasattr(module, "original_max_seq_len"):
                continue  # not of transformers' own kind
            stack.callback(module.__dict__.pop, "forward")
            stack.callback(module.__dict__.__setitem__, "_buffers", dict(module._buffers))
            for layer_type, kind in kinds.items():
                if kind == "longrope":
                    module._buffers[f"{_prefix(layer_type)}frequencies_beyond"] = _long(module, layer_type)
            module.forward = partial(_forward, module, inner)
        yield


def _follows_length(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _prefix(layer_type: str | None) -> str:
    return f"{layer_type}_" if layer_type else ""


def _of_type(layer_type: str | None) -> dict[str, str]:
    return {"layer_type": layer_type} if layer_type else {}


def _trained_length(module: nn.Module, layer_type: str | None) -> int:
    parameters = module.config.rope_parameters
    return (parameters[layer_type] if layer_type else parameters)["original_max_position_embeddings"]


def _long(module: nn.Module, layer_type: str | None) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short = getattr(module, f"{_prefix(layer_type)}original_inv_freq")
    beyond = _trained_length(module, layer_type) + 1
    init = ROPE_INIT_FUNCTIONS["longrope"]
    return init(module.config, short.device, seq_len=beyond, **_of_type(layer_type))[0].to(short.device)


def _forward(module: nn.Module, inner: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = module.rope_type[layer_type] if layer_type else module.rope_type
    if not _follows_length(kind):
        return inner(module, x, position_ids, **_of_type(layer_type))
    prefix, length = _prefix(layer_type), position_ids.max() + 1
    short = getattr(module, f"{prefix}original_inv_freq").to(x.device)
    if kind == "longrope":
        beyond = module._buffers[f"{prefix}frequencies_beyond"].to(x.device)
        frequencies = torch.where(length > _trained_length(module, layer_type), beyond, short)
    else:
        grown, _ = ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, **_of_type(layer_type))
        frequencies = torch.where(length > module.original_max_seq_len, grown, short)
    name = f"{prefix}inv_freq"
    before = module._buffers[name]
    module._buffers[name] = frequencies
    try:
        return inner(module, x, position_ids, **_of_type(layer_type))
    finally:
        module._buffers[name] = before
