"""The key and value cache of a decoder: a Hugging Face object outside, plain tensors in a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxc.errors import UsageError


def cache_of(tensors: Sequence[Tensor]) -> Any:
    """A Hugging Face cache over keys and values, [batch, kv_heads, length, head_dim] each, layer by layer. Its layers keep
    every position, also in models with a sliding window, whose mask hides what lies outside."""
    from transformers import DynamicCache

    cache = DynamicCache()
    write(cache, tensors)
    return cache


def cross_cache_of(tensors: Sequence[Tensor]) -> Any:
    """The same for a decoder beside an encoder: the cache of its self-attention, and for what the encoder made one that keeps
    nothing, so that every call computes keys and values of that anew."""
    from transformers import DynamicCache, EncoderDecoderCache

    class KeepsNothing(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key_states, value_states

    return EncoderDecoderCache(cache_of(tensors), KeepsNothing())


def tensors_of(cache: Any) -> list[Tensor]:
    """The keys and values of a Hugging Face cache, layer by layer; none of a layer that holds nothing yet."""
    return [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]


def write(cache: Any, tensors: Sequence[Tensor]) -> None:
    """Put keys and values into a Hugging Face cache in place of what it holds."""
    from transformers.cache_utils import DynamicLayer

    layers = []
    for key, value in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = key, value
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        layers.append(layer)
    cache.layers = layers


def check_is_dynamic(cache: Any) -> None:
    """Raise `UsageError` unless `cache` is one that grows and keeps every position, or holds nothing yet."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not isinstance(cache, DynamicCache):
        raise UsageError(
            f"a {type(cache).__name__} cannot be the cache of a compiled model",
            where="past_key_values",
            hint="pass a transformers.DynamicCache, or nothing",
        )
    for layer in cache.layers:
        if type(layer) is not DynamicLayer and layer.is_initialized:
            raise UsageError(
                f"a cache layer of the kind {type(layer).__name__} has dropped positions that the program needs",
                where="past_key_values",
                hint="let the compiled model make its own cache",
            )
