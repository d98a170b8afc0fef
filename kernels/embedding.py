"""The lookups ``fxc::int8_embedding`` and ``fxc::int4_embedding``: rows of a packed table, of which only those that are read
become floats.

The table is a weight [N, K] as the linear ops have it, so that a head that is tied to it reads the same numbers:

    row i, int8    scale[i] * qweight[i, k]                                               fxc_kernels.int8_linear
    row i, int4    scale[i, k // group] * (q[i, k] - zero[i, k // group])                 fxc_kernels.int4_linear

computed in float32 and rounded to `dtype` once.
"""

import torch
from torch import Tensor

from fxc_kernels.int4_linear import GROUPS, columns_of, dequantize
from fxc_kernels.no_gradient import operator


def _check(indices: Tensor, qweight: Tensor, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Raise TypeError on a wrong dtype and ValueError on a wrong shape."""
    if indices.dtype not in (torch.int64, torch.int32) or qweight.dtype != stored:
        raise TypeError(f"indices must be int64 or int32 and qweight {stored}, got {indices.dtype} and {qweight.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"rows are floating point, not {dtype}")
    if qweight.dim() != 2:
        raise ValueError(f"qweight must be a matrix, got {tuple(qweight.shape)}")


def _check_int8(indices: Tensor, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    _check(indices, qweight, torch.int8, dtype)
    if scale.dtype != torch.float32 or tuple(scale.shape) != (qweight.shape[0],):
        raise ValueError(f"scale must be float32 [{qweight.shape[0]}], got {scale.dtype} {tuple(scale.shape)}")


def _check_int4(
    indices: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> None:
    _check(indices, qweight, torch.uint8, dtype)
    columns = columns_of(qweight)
    if group not in GROUPS or columns % group:
        raise ValueError(f"group must be one of {GROUPS} and divide K={columns}, got {group}")
    shape = (qweight.shape[0], columns // group)
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise ValueError(f"scale and zero must have shape {shape}")


@operator("fxc::int8_embedding")
def int8_embedding(indices: Tensor, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """indices [...] int64 or int32 below N, qweight int8 [N, K], scale float32 [N]; returns [..., K] of `dtype`.

    Raises TypeError on a wrong dtype, ValueError on a wrong shape, IndexError (on a CPU) for a row that is not there."""
    _check_int8(indices, qweight, scale, dtype)
    flat = indices.flatten()
    rows = qweight.index_select(0, flat).float() * scale.index_select(0, flat)[:, None]
    return rows.to(dtype).unflatten(0, indices.shape) if indices.dim() else rows[0].to(dtype)


@int8_embedding.register_fake
def _(indices: Tensor, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_int8(indices, qweight, scale, dtype)
    return torch.empty(*indices.shape, qweight.shape[1], dtype=dtype, device=qweight.device)


@operator("fxc::int4_embedding")
def int4_embedding(
    indices: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """indices [...] int64 or int32 below N, qweight uint8 [N, K/2], scale [N, K/group], zero uint8 [N, K/group] or None, group
    32, 64 or 128, a divisor of K; returns [..., K] of `dtype`. Raises as `int8_embedding`."""
    _check_int4(indices, qweight, scale, zero, group, dtype)
    flat = indices.flatten()
    of = [None if each is None else each.index_select(0, flat) for each in (qweight, scale, zero)]
    rows = dequantize(*of, group)
    return rows.to(dtype).unflatten(0, indices.shape) if indices.dim() else rows[0].to(dtype)


@int4_embedding.register_fake
def _(indices: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    _check_int4(indices, qweight, scale, zero, group, dtype)
    return torch.empty(*indices.shape, columns_of(qweight), dtype=dtype, device=qweight.device)
