"""The int4 2:4 sparse linear op ``fxc::int4_sparse24_linear``: of each four neighbours two int4 values, in groups along K.

Its weight is that of ``fxc::int4_weight_only_linear`` where it is stored, and zero elsewhere. Two values are stored for each
four numbers of a row, in order, and where among the four they stood, as in ``fxc::sparse24_linear``; a group counts the columns
of the whole row, so that half of them are stored. The plain torch function ``int4_sparse24_linear_reference`` is the meaning of
the op: every kernel and every lowering is judged against it.
"""

import torch
from torch import Tensor

from fxc_kernels import int4_linear, sparse24_linear
from fxc_kernels.no_gradient import operator


def dequantize(qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """qweight uint8 [N, K/4], meta uint8 [N, K/8], scale and zero [N, K/group] -> float32 [N, K], zeros included."""
    return sparse24_linear.unpack(int4_linear.dequantize(qweight, scale, zero, group // 2), meta)


def _check(
    x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> None:
    """Raise TypeError on a wrong dtype and ValueError on a wrong shape."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if any(each is not None and each.dtype != torch.uint8 for each in (qweight, meta, zero)):
        raise TypeError("qweight, meta and zero must be uint8")
    if scale.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"scale must be float32 or x's {x.dtype}, got {scale.dtype}")
    if group not in int4_linear.GROUPS:
        raise ValueError(f"group must be one of {int4_linear.GROUPS}, got {group}")
    if x.dim() < 1 or qweight.dim() != 2 or x.shape[-1] != 4 * qweight.shape[1]:
        raise ValueError(f"x [..., K] and qweight [N, K/4] do not fit: {tuple(x.shape)} and {tuple(qweight.shape)}")
    rows, columns = qweight.shape[0], 4 * qweight.shape[1]
    if columns % group:
        raise ValueError(f"group={group} does not divide K={columns}")
    if tuple(meta.shape) != (rows, columns // sparse24_linear.BYTE):
        raise ValueError(f"meta must have shape ({rows}, K/8): {tuple(meta.shape)}, K={columns}")
    shape = (rows, columns // group)
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise ValueError(f"scale and zero must have shape {shape}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape ({rows},)")


def int4_sparse24_linear_reference(
    x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """x @ w^T + bias in float32, with the weight w that `dequantize` gives.

    x [..., K] float32/bfloat16/float16, qweight uint8 [N, K/4], meta uint8 [N, K/8], scale [N, K/group] float32 or x's dtype,
    zero uint8 [N, K/group] or None, bias [N] or None, group 32, 64 or 128, a divisor of K; returns [..., N] in x's dtype.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    _check(x, qweight, meta, scale, zero, bias, group)
    weight = dequantize(qweight, meta, scale, zero, group)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@operator("fxc::int4_sparse24_linear")
def int4_sparse24_linear(
    x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """See `int4_sparse24_linear_reference`."""
    return int4_sparse24_linear_reference(x, qweight, meta, scale, zero, bias, group)


@int4_sparse24_linear.register_fake
def _(
    x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    _check(x, qweight, meta, scale, zero, bias, group)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])
