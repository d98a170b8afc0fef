"""The 2:4 sparse linear ops: ``fxc::sparse24_linear`` and ``fxc::int8_sparse24_linear``.

Of every four neighbours along K at most two are not zero. Two values are stored for each four, in order, and where among
the four they stood: two bits each, four of them in a byte (`unpack` is the exact definition, fxc/schemes/sparse24.py has
a picture). The plain torch functions ``sparse24_linear_reference`` and ``int8_sparse24_linear_reference`` are the meaning
of the ops: every kernel and every lowering is judged against them.
"""

import torch
from torch import Tensor

from fxc_kernels.int8_linear import int8_linear_reference
from fxc_kernels.no_gradient import operator

BYTE = 8
"""How many numbers of a row one byte of positions is for."""


def unpack_positions(meta: Tensor) -> Tensor:
    """uint8 [N, K/8] -> int64 [N, K/4, 2]: for each four of a row, which two of them are stored, 0..3."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=meta.device)
    return ((meta[..., None] >> shifts) & 3).long().reshape(meta.shape[0], 2 * meta.shape[1], 2)


def unpack(values: Tensor, meta: Tensor) -> Tensor:
    """values [N, K/2] of any dtype, meta uint8 [N, K/8] -> the matrix [N, K]. Two values at one place are added."""
    positions = unpack_positions(meta)
    fours = values.new_zeros(*positions.shape[:2], 4)
    return fours.scatter_add_(-1, positions, values.reshape(positions.shape)).flatten(1)


def _check(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError on a wrong dtype and ValueError on a wrong shape."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if meta.dtype != torch.uint8:
        raise TypeError(f"meta must be uint8, got {meta.dtype}")
    if x.dim() < 1 or values.dim() != 2 or x.shape[-1] != 2 * values.shape[1]:
        raise ValueError(f"x [..., K] and values [N, K/2] do not fit: {tuple(x.shape)} and {tuple(values.shape)}")
    rows, columns = values.shape[0], 2 * values.shape[1]
    if columns % BYTE or tuple(meta.shape) != (rows, columns // BYTE):
        raise ValueError(f"meta must have shape ({rows}, K/8) for a K that 8 divides: {tuple(meta.shape)}, K={columns}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape ({rows},)")


def _check_float(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> None:
    _check(x, values, meta, bias)
    if values.dtype != x.dtype:
        raise TypeError(f"values must be of x's {x.dtype}, got {values.dtype}")


def _check_int8(x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    _check(x, qweight, meta, bias)
    if qweight.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"qweight must be int8 and scale float32, got {qweight.dtype} and {scale.dtype}")
    if tuple(scale.shape) != (qweight.shape[0],):
        raise ValueError(f"scale must have shape ({qweight.shape[0]},)")


def sparse24_linear_reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w^T + bias with the matrix w that `unpack` gives, computed in float32, or in float64 for x of that dtype.

    x [..., K] float, values [N, K/2] of x's dtype, meta uint8 [N, K/8], bias [N] or None; returns [..., N] in x's dtype.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    _check_float(x, values, meta, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = unpack(values, meta).to(wide)
    return torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def int8_sparse24_linear_reference(x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``fxc::int8_linear`` with the matrix that `unpack` gives: activations are quantized per row (token), asymmetric.

    x [..., K] float32/bfloat16/float16, qweight int8 [N, K/2], meta uint8 [N, K/8], scale float32 [N], bias [N] or None;
    returns [..., N] in x's dtype. Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    _check_int8(x, qweight, meta, scale, bias)
    return int8_linear_reference(x, unpack(qweight, meta), scale, bias)


@operator("fxc::sparse24_linear")
def sparse24_linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """See `sparse24_linear_reference`."""
    return sparse24_linear_reference(x, values, meta, bias)


@operator("fxc::int8_sparse24_linear")
def int8_sparse24_linear(x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `int8_sparse24_linear_reference`."""
    return int8_sparse24_linear_reference(x, qweight, meta, scale, bias)


@sparse24_linear.register_fake
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    _check_float(x, values, meta, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


@int8_sparse24_linear.register_fake
def _(x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_int8(x, qweight, meta, scale, bias)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])
