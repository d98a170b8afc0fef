"""Packed weights as the plain numbers that they stand for, for where the machine has no product of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxc_kernels import fp8_linear, int4_linear, sparse24_linear

INT8 = torch.ops.fxc.int8_linear.default
INT8_WEIGHT_ONLY = torch.ops.fxc.int8_weight_only_linear.default
FP8 = torch.ops.fxc.fp8_linear.default
FP8_WEIGHT_ONLY = torch.ops.fxc.fp8_weight_only_linear.default
INT4 = torch.ops.fxc.int4_weight_only_linear.default
SPARSE24 = torch.ops.fxc.sparse24_linear.default
INT8_SPARSE24 = torch.ops.fxc.int8_sparse24_linear.default

# What a CPU has no product for in general.
NAMES = {INT4: "int4", FP8: "fp8", FP8_WEIGHT_ONLY: "fp8", SPARSE24: "2:4 sparse"}


def dense_weight(target: object, args: tuple, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of a call of `target`, one of fxc's linear operators, with these arguments, constants being tensors,
    as `dtype`."""
    if target is INT4:
        _, qweight, scale, zero, _, group = args
        return int4_linear.dequantize(qweight, scale, zero, group).to(dtype)
    if target is SPARSE24:
        return sparse24_linear.unpack(args[1], args[2]).to(dtype)
    if target in (FP8, FP8_WEIGHT_ONLY):
        return fp8_linear.dequantize(args[1], args[2]).to(dtype)
    qweight, scale = (sparse24_linear.unpack(*args[1:3]), args[3]) if target is INT8_SPARSE24 else args[1:3]
    return (qweight.float() * scale[:, None]).to(dtype)


def bias_of(target: object, args: tuple) -> object:
    """The bias among the arguments of fxc's linear operators."""
    position = 4 if target in (INT4, INT8_SPARSE24) else 3
    return args[position] if len(args) > position else None
