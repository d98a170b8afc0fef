"""aten::scaled_dot_product_attention on a CPU by attention.cpp, where that is faster than torch's: its keys and values fit into
a cache, or there are few queries, which read them as they are."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxc_kernels.cpu import native
from fxc_kernels.cpu.native import pointer

# To lay keys and values out anew does not pay for fewer.
FEW_QUERIES = 8
# Numbers of the keys of a head, for more queries. Measured with 1 to 32 sequences of 32 to 2048 tokens, heads of 32 to 128
# numbers (Zen 5).
MOST_NUMBERS = 1 << 18
WIDTH = 16


@functools.cache
def _functions(level: str) -> tuple[Callable, Callable]:
    library = native.library("attention", level)
    at, number = ctypes.c_void_p, ctypes.c_int
    scratch, attention = library.attention_scratch, library.attention
    scratch.restype, scratch.argtypes = ctypes.c_int64, (at, number)
    attention.restype = None
    attention.argtypes = (at, at, at, at, number, number, number, ctypes.c_float, at, at, at, number)
    return scratch, attention


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_functions)


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False, is_rough: bool = False,
) -> Tensor:  # fmt: skip
    """query [B, H, Q, D], key and value [B, H, K, D], with enable_gqa of fewer heads, all float32 or all bfloat16; attn_mask
    bool or of their dtype, to be expanded to [B, H, Q, K]; -> [B, H, Q, D], laid out as [B, Q, H, D]. A query that sees no key
    gets zeros, as in torch. dropout_p is 0. is_rough: products of float32 may be of bfloat16, where the CPU multiplies it."""
    if not _pays(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = attn_mask
    batch, heads, queries, depth = query.shape
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    y = query.new_empty(batch, queries, heads, depth)
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.expand(batch, heads, queries, key.shape[2])
        strides = mask.stride()
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], depth)
    steps = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides)
    is_bfloat16 = query.dtype == torch.bfloat16
    numbers = (ctypes.c_int64 * 21)(*sizes, *steps, queries < FEW_QUERIES, (is_bfloat16 or is_rough) and _multiplies_bfloat16())
    threads = native.threads()
    scratch, attention = _functions(native.level())
    space = torch.empty(scratch(ctypes.addressof(numbers), threads), dtype=torch.uint8, device=query.device)
    attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), pointer(mask), is_bfloat16, kind, is_causal,
        depth**-0.5 if scale is None else scale, ctypes.addressof(numbers), y.data_ptr(), space.data_ptr(), threads,
    )  # fmt: skip
    return y.transpose(1, 2)


@functools.cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        key.shape[2] > 0
        and (query.shape[2] < FEW_QUERIES or key.shape[2] * key.shape[3] <= MOST_NUMBERS)
        and key.shape[0] == query.shape[0]
        and value.shape[3] == key.shape[3]
        and query.numel() > 0
    )
