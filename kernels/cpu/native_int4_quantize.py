"""Rounding weights to 4, 3 and 2 bits by int4_quantize.cpp, to the same bits as `fxc/schemes/int4.py` says in torch."""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxc_kernels.cpu import native


@functools.cache
def _function(level: str) -> Callable:
    quantize = native.library("int4_quantize", level).int4_quantize
    at, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    quantize.restype = number
    quantize.argtypes = (at, number, long, long, number, number, number, number, number, at, at, at, at, number)
    return quantize


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_function)


def quantize(
    weight: Tensor, group: int, bits: int, symmetric: bool, full_range: bool, kept: torch.dtype, shares: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """weight [N, K] float32 or bfloat16, contiguous -> (levels uint8 [N, K], of 4 bits packed [N, K/2]; scale `kept`
    [N, K/group]; zero uint8, as scale). Of `shares` of a group's range each has the one with the least squared error. None
    where a number is NaN or infinite."""
    rows, columns = weight.shape
    levels = torch.empty(rows, columns // 2 if bits == 4 else columns, dtype=torch.uint8)
    scale = torch.empty(rows, columns // group, dtype=torch.float32)
    zero = torch.empty(rows, columns // group, dtype=torch.uint8)
    tried = torch.tensor(shares, dtype=torch.float32)
    are_finite = _function(native.level())(
        weight.data_ptr(), weight.dtype == torch.bfloat16, scale.numel(), group, bits, symmetric, full_range,
        kept == torch.bfloat16, len(shares), tried.data_ptr(), levels.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return (levels, scale.to(kept), zero) if are_finite else None
