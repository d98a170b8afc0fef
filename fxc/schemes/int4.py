"""int4 weights: groups of 32, 64 or 128 along K, each with its scale and perhaps its zero point.

    row n of the weight, group=4 for the picture:

        k        0   1   2   3 | 4   5   6   7            q[k] in 0..15
        q        3  15   8   0 | 7   9   8  12
                 |   |
                 |   +--- high half of byte 0
                 +------- low half of byte 0

        qweight  0xF3  0x08 |  0x97  0xC8                 uint8 [N, K/2], byte j = q[2j] | q[2j+1] << 4
        scale      s[0]     |    s[1]                     [N, K/group]
        zero       z[0]     |    z[1]                     uint8 [N, K/group], 0..15; symmetric weights have none: z = 8

        w[k] ~= s[k // group] * (q[k] - z[k // group])

Symmetric, q - 8 is in -8..7, and s may be negative, so that the number of largest magnitude is at -8 whatever its sign.
The op that uses them is in fxc_kernels.int4_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.errors import InputRefused
from fxc.schemes.checks import check_weight
from fxc.schemes.scheme import Product, Scheme, register
from fxc_kernels.int4_linear import BITS, GROUPS, LARGEST, MIDDLE, dequantize, unpack

__all__ = ["BITS", "GROUPS", "LINEAR", "SCHEME", "dequantize", "pack", "quantize_weight", "unpack"]

LINEAR = torch.ops.fxc.int4_weight_only_linear.default

# A group whose range is not above this counts as all zero: below it, 1/scale would overflow float32.
ZERO_GROUP = 1e-30
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def pack(values: Tensor) -> Tensor:
    """uint8 [..., K], values 0..15, K even -> uint8 [..., K/2], the even k in the low half of a byte. `unpack` undoes it.

    Raises InputRefused for an odd K or values that four bits do not hold.
    """
    if values.dtype != torch.uint8 or values.shape[-1] % 2:
        raise InputRefused("only an even number of uint8 values can be packed", why=f"{values.dtype}{list(values.shape)}")
    if (values > LARGEST).any():
        raise InputRefused("four bits hold 0 to 15", why=f"the largest value is {int(values.max())}")
    return values[..., 0::2] | values[..., 1::2] << BITS


def quantize_weight(
    weight: Tensor, group: int, symmetric: bool, full_range: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round `weight` [N, K] (any float dtype) to int4: (packed uint8 [N, K/2], scale [N, K/group], zero or None).

    With r = 1, symmetric: scale = r * m / -8, m the number of largest magnitude in the group with its sign, which is then
    exact and all levels are used; without `full_range` scale = r * |m| / 7. Asymmetric: scale = r * (hi - lo) / 15 with
    lo <= 0 <= hi and zero = round(-r * lo / scale). Of the shares r in `SHARES` each group has the one with the least squared
    error: where few numbers are large it pays to cut them off. Groups of zeros have scale 1. The scale is float32, for a
    bfloat16 weight bfloat16, and it is that number which the weight is divided by.
    Raises InputRefused when the weight is not a float matrix, holds NaN or Inf, or when `group` does not divide K.
    """
    check_weight(weight, "int4")
    if group not in GROUPS or weight.shape[1] % group:
        raise InputRefused(f"group={group} does not divide rows of {weight.shape[1]}", why=f"groups are {GROUPS}")
    kept = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    values = weight.detach().float().unflatten(1, (-1, group))
    best = least = None
    for share in SHARES:
        found = _rounded(values, share, symmetric, full_range, kept)
        q, scale, zero = found
        error = (q - zero).mul_(scale).sub_(values).square_().sum(-1, keepdim=True)
        if best is None:
            best, least = found, error
        else:
            best = tuple(torch.where(error < least, new, old) for new, old in zip(found, best, strict=True))
            least = torch.minimum(error, least)
    q, scale, zero = best
    packed = pack(q.to(torch.uint8).flatten(1))
    return packed, scale.squeeze(-1).to(kept), None if symmetric else zero.squeeze(-1).to(torch.uint8)


def _rounded(
    values: Tensor, share: float, symmetric: bool, full_range: bool, kept: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero) of the groups `values` [N, K/group, group], all float32, when `share` of their range is used."""
    if symmetric:
        largest = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))
        span = largest.abs()
        scale = _scale(span, share * (largest / -MIDDLE if full_range else span / (LARGEST - MIDDLE)), kept)
        zero = torch.full_like(scale, MIDDLE)
    else:
        lo = values.amin(dim=-1, keepdim=True).clamp(max=0)
        span = values.amax(dim=-1, keepdim=True).clamp(min=0) - lo
        scale = _scale(span, share * span / LARGEST, kept)
        zero = (-share * lo / scale).round_().clamp_(0, LARGEST)
    return (values / scale).round_().add_(zero).clamp_(0, LARGEST), scale, zero


def _scale(span: Tensor, scale: Tensor, kept: torch.dtype) -> Tensor:
    """`scale` as the dtype `kept` holds it, in float32; 1 where the group is zero."""
    return torch.where(span <= ZERO_GROUP, 1.0, scale).to(kept).float()


def _dense(qweight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return dequantize(qweight, scale, zero, 2 * qweight.shape[1] // scale.shape[1])


SCHEME = register(
    Scheme(
        name="int4",
        label="int4",
        parts={"qweight": None, "scale": "scales", "zero": "zero points"},
        products=(Product(LINEAR, "int4_g{group}", "int4 linear"),),
        quantize=quantize_weight,
        dequantize=_dense,
        options={"group": GROUPS, "symmetric": (True, False), "full_range": (True, False)},
        multiple=lambda group, **_: (group, "a group"),
        has_signed_scales=True,
    )
)
