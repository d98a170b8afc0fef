"""The linear ops ``fxc::int4_weight_only_linear``, ``int3`` and ``int2``: weights in groups along K, float activations.

The plain torch function ``int4_weight_only_linear_reference`` is the meaning of the ops: every kernel and every lowering
is judged against it.

    w[n, k] = scale[n, k // group] * (q[n, k] - zero[n, k // group])      q and zero in 0..15; zero is 8 where it is None

and in 0..7 with 4, in 0..3 with 2. A row of q is a stream of bits, the lowest of a byte first, in which each number has its
4, 3 or 2 (`unpack` is the exact definition, fxc/schemes/int4.py has a picture).
"""

import math

import torch
from torch import Tensor

from fxc_kernels.no_gradient import operator

GROUPS = (32, 64, 128)
BITS = 4
LARGEST = 15
# What a weight without zero points stores for 0.
MIDDLE = 8


def unit(bits: int) -> tuple[int, int]:
    """(how many numbers, in how many bytes) stand for themselves in a stream of numbers of so many bits."""
    numbers = 8 // math.gcd(8, bits)
    return numbers, numbers * bits // 8


def columns_of(qweight: Tensor, bits: int = BITS) -> int:
    """K of uint8 [..., K * bits / 8]."""
    numbers, nbytes = unit(bits)
    return qweight.shape[-1] // nbytes * numbers


def unpack(packed: Tensor, bits: int = BITS) -> Tensor:
    """uint8 [..., K * bits / 8] -> uint8 [..., K]: number k has the bits from `bits` * k on of a row, lowest first."""
    numbers, nbytes = unit(bits)
    words = packed.unflatten(-1, (-1, nbytes))
    if nbytes > 1:
        words = sum(words[..., at : at + 1].int() << 8 * at for at in range(nbytes))
    return torch.cat([words >> bits * at & (1 << bits) - 1 for at in range(numbers)], dim=-1).flatten(-2).to(torch.uint8)


def dequantize(qweight: Tensor, scale: Tensor, zero: Tensor | None, group: int, bits: int = BITS) -> Tensor:
    """The weight [N, K] of the module's formula, float32: one rounding, of the product."""
    q = unpack(qweight, bits).unflatten(-1, (-1, group)).float()
    q = q - (1 << bits - 1 if zero is None else zero.float()[..., None])
    return (q * scale.float()[..., None]).flatten(-2)


def _check(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, bits: int) -> None:
    """Raise TypeError on a wrong dtype and ValueError on a wrong shape."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if qweight.dtype != torch.uint8 or (zero is not None and zero.dtype != torch.uint8):
        raise TypeError(f"qweight and zero must be uint8, got {qweight.dtype} and {None if zero is None else zero.dtype}")
    if scale.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"scale must be float32 or x's {x.dtype}, got {scale.dtype}")
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group}")
    if x.dim() < 1 or qweight.dim() != 2 or x.shape[-1] * bits != 8 * qweight.shape[1]:
        of = f"K*{bits}/8" if 8 % bits else f"K/{8 // bits}"
        raise ValueError(f"x [..., K] and qweight [N, {of}] do not fit: {tuple(x.shape)} and {tuple(qweight.shape)}")
    rows, columns = qweight.shape[0], x.shape[-1]
    if columns % group:
        raise ValueError(f"group={group} does not divide K={columns}")
    shape = (rows, columns // group)
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise ValueError(f"scale and zero must have shape {shape}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape ({rows},)")


def int4_weight_only_linear_reference(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, bits: int = BITS
) -> Tensor:
    """x @ w^T + bias in float32, with w by the module's formula.

    x [..., K] float32/bfloat16/float16, qweight uint8 [N, K * bits / 8], scale [N, K/group] float32 or x's dtype, zero uint8
    [N, K/group] or None, bias [N] or None, group 32, 64 or 128, a divisor of K; returns [..., N] in x's dtype.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    _check(x, qweight, scale, zero, bias, group, bits)
    weight = dequantize(qweight, scale, zero, group, bits)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _register(bits: int) -> None:
    @operator(f"fxc::int{bits}_weight_only_linear")
    def linear(
        x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
    ) -> Tensor:
        return int4_weight_only_linear_reference(x, qweight, scale, zero, bias, group, bits)

    @linear.register_fake
    def _(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
        _check(x, qweight, scale, zero, bias, group, bits)
        return x.new_empty(*x.shape[:-1], qweight.shape[0])


for _bits in (4, 3, 2):
    _register(_bits)
