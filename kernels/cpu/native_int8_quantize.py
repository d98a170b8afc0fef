"""Rounding weights to int8 by int8_quantize.cpp, to the same bits as `fxc/schemes/int8.py` says in torch."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxc_kernels.cpu import native


@functools.cache
def _function(level: str) -> Callable:
    quantize = native.library("int8_quantize", level).int8_quantize
    at, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    quantize.restype = number
    quantize.argtypes = (at, number, long, long, ctypes.c_float, at, at, number)
    return quantize


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_function)


def quantize(weight: Tensor, zero_row: float) -> tuple[Tensor, Tensor] | None:
    """weight [N, K] float32 or bfloat16, contiguous -> (levels int8 [N, K], scale float32 [N], which is 1 for rows with no
    number above `zero_row`). None where a number is NaN or infinite."""
    rows, columns = weight.shape
    levels, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, dtype=torch.float32)
    are_finite = _function(native.level())(
        weight.data_ptr(), weight.dtype == torch.bfloat16, rows, columns, zero_row, levels.data_ptr(), scale.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return (levels, scale) if are_finite else None
