"""Packed weights of which this CPU has no product, as the plain numbers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxc_kernels import fp8_linear, int4_linear, sparse24_linear

INT4 = torch.ops.fxc.int4_weight_only_linear.default
SPARSE24 = torch.ops.fxc.sparse24_linear.default
INT8_SPARSE24 = torch.ops.fxc.int8_sparse24_linear.default

NAMES = {
    INT4: "int4",
    torch.ops.fxc.fp8_linear.default: "fp8",
    torch.ops.fxc.fp8_weight_only_linear.default: "fp8",
    SPARSE24: "2:4 sparse",
}


def dense_weight(target: object, args: tuple, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of a call of `target`, one of `NAMES`, with these arguments, constants being tensors, as `dtype`."""
    if target is INT4:
        _, qweight, scale, zero, _, group = args
        return int4_linear.dequantize(qweight, scale, zero, group).to(dtype)
    if target is SPARSE24:
        return sparse24_linear.unpack(args[1], args[2]).to(dtype)
    return fp8_linear.dequantize(args[1], args[2]).to(dtype)


def bias_of(target: object, args: tuple) -> object:
    """The bias among the arguments of fxc's linear operators."""
    position = 4 if target in (INT4, INT8_SPARSE24) else 3
    return args[position] if len(args) > position else None
