"""What stands between products on a CPU, by between.cpp: RMS and layer norms with the residual sum in front of them, rotary
embedding, silu(gate) * up. Each is one call where aten takes up to ten, which at one token is most of the time."""

import ctypes
import functools

import torch
from torch import Tensor

from fxc_kernels.cpu import native
from fxc_kernels.cpu.native import pointer

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _library(level: str) -> ctypes.CDLL:
    library = native.library("between", level)
    at, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.norm.argtypes = (at, at, at, at, number, number, ctypes.c_float, long, long, at, at, at, number)
    library.rotate.argtypes = (at, at, at, number, at, at, at, number)
    library.gate.argtypes = (at, at, number, long, long, long, at, number)
    library.norm.restype = library.rotate.restype = library.gate.restype = None
    return library


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_library)


def _norm(
    x: Tensor, other: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms: bool, with_sum: bool
) -> tuple[Tensor, Tensor | None]:
    x = x.contiguous()
    other = None if other is None else other.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x) if with_sum else None
    if x.numel():
        threads, columns = native.threads(), x.shape[-1]
        space = torch.empty(threads * (columns + 15), dtype=torch.float32, device=x.device)
        _library(native.level()).norm(
            x.data_ptr(), pointer(other), pointer(weight), pointer(bias), x.dtype == torch.bfloat16, is_rms, eps,
            x.numel() // columns, columns, y.data_ptr(), pointer(total), space.data_ptr(), threads,
        )  # fmt: skip
    return y, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension, rounded to x's dtype before the weight."""
    return _norm(x, None, weight, None, eps, True, False)[0]


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the norm of x + other, x + other)"""
    return _norm(x, other, weight, None, eps, True, True)


def layer_norm(x: Tensor, other: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """aten::layer_norm of x + other, or of x, over the last dimension."""
    return _norm(x, other, weight, bias, eps, False, False)[0]


def add_layer_norm(
    x: Tensor, other: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(the norm of x + other, x + other)"""
    return _norm(x, other, weight, bias, eps, False, True)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + [-second half of x, first half] * sin; x [B, H, S, D], cos and sin [B or 1, 1, S, D]; -> [B, H, S, D]."""
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    batch = x.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        tables = (cos.expand(batch, -1, -1, -1), sin.expand(batch, -1, -1, -1))
        strides = (ctypes.c_int64 * 7)(*x.stride()[:3], *(each.stride(at) for each in tables for at in (0, 2)))
        sizes = (ctypes.c_int64 * 4)(*x.shape)
        _library(native.level()).rotate(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.dtype == torch.bfloat16, ctypes.addressof(sizes),
            ctypes.addressof(strides), y.data_ptr(), native.threads(),
        )  # fmt: skip
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, two parts of one product as they are."""
    columns = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        gate, up = gate.reshape(-1, columns), up.reshape(-1, columns)
        if gate.stride() != up.stride() or gate.stride(1) != 1:
            gate, up = gate.contiguous(), up.contiguous()
        _library(native.level()).gate(
            gate.data_ptr(), up.data_ptr(), gate.dtype == torch.bfloat16, len(gate), columns, gate.stride(0), y.data_ptr(),
            native.threads(),
        )  # fmt: skip
    return y
