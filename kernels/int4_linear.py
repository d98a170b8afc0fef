"""The int4 linear op ``fxc::int4_weight_only_linear``: int4 weights in groups along K, float activations.

The plain torch function ``int4_weight_only_linear_reference`` is the meaning of the op: every kernel and every lowering
is judged against it.

    w[n, k] = scale[n, k // group] * (q[n, k] - zero[n, k // group])      q and zero in 0..15; zero is 8 where it is None

Two values share a byte, the even k in its low half (`unpack` is the exact definition, fxc/schemes/int4.py has a picture).
"""

import torch
from torch import Tensor

from fxc_kernels.no_gradient import operator

GROUPS = (32, 64, 128)
BITS = 4
LARGEST = 15
# What a weight without zero points stores for 0.
MIDDLE = 8


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] -> uint8 [..., K], values 0..15: the low half of byte j is k = 2j, the high half k = 2j + 1."""
    return torch.stack([packed & LARGEST, packed >> BITS], dim=-1).flatten(-2)


def dequantize(qweight: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """The weight [N, K] of the module's formula, float32: one rounding, of the product."""
    q = unpack(qweight).unflatten(-1, (-1, group)).float()
    q = q - (MIDDLE if zero is None else zero.float()[..., None])
    return (q * scale.float()[..., None]).flatten(-2)


def _check(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int) -> None:
    """Raise TypeError on a wrong dtype and ValueError on a wrong shape."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if qweight.dtype != torch.uint8 or (zero is not None and zero.dtype != torch.uint8):
        raise TypeError(f"qweight and zero must be uint8, got {qweight.dtype} and {None if zero is None else zero.dtype}")
    if scale.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"scale must be float32 or x's {x.dtype}, got {scale.dtype}")
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group}")
    if x.dim() < 1 or qweight.dim() != 2 or x.shape[-1] != 2 * qweight.shape[1]:
        raise ValueError(f"x [..., K] and qweight [N, K/2] do not fit: {tuple(x.shape)} and {tuple(qweight.shape)}")
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    if columns % group:
        raise ValueError(f"group={group} does not divide K={columns}")
    shape = (rows, columns // group)
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise ValueError(f"scale and zero must have shape {shape}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape ({rows},)")


def int4_weight_only_linear_reference(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """x @ w^T + bias in float32, with w by the module's formula.

    x [..., K] float32/bfloat16/float16, qweight uint8 [N, K/2], scale [N, K/group] float32 or x's dtype, zero uint8
    [N, K/group] or None, bias [N] or None, group 32, 64 or 128, a divisor of K; returns [..., N] in x's dtype.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    _check(x, qweight, scale, zero, bias, group)
    weight = dequantize(qweight, scale, zero, group)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@operator("fxc::int4_weight_only_linear")
def int4_weight_only_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """See `int4_weight_only_linear_reference`."""
    return int4_weight_only_linear_reference(x, qweight, scale, zero, bias, group)


@int4_weight_only_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
    _check(x, qweight, scale, zero, bias, group)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])
