"""int4, int3 and int2 weights: groups of 32, 64 or 128 along K, each with its scale and perhaps its zero point.

    row n of an int4 weight, group=4 for the picture:

        k        0   1   2   3 | 4   5   6   7            q[k] in 0..15
        q        3  15   8   0 | 7   9   8  12
                 |   |
                 |   +--- high half of byte 0
                 +------- low half of byte 0

        qweight  0xF3  0x08 |  0x97  0xC8                 uint8 [N, K/2], byte j = q[2j] | q[2j+1] << 4
        scale      s[0]     |    s[1]                     [N, K/group]
        zero       z[0]     |    z[1]                     uint8 [N, K/group], 0..15; symmetric weights have none: z = 8

        w[k] ~= s[k // group] * (q[k] - z[k // group])

    of an int3 weight, eight numbers in three bytes, uint8 [N, 3K/8], q and z in 0..7, without zero points z = 4:

        byte          0               1               2
        bit    0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7
        q[k]   0 0 0 1 1 1 2 2 2 3 3 3 4 4 4 5 5 5 6 6 6 7 7 7     the lowest bit of a number first

    of an int2 weight, four numbers in a byte, uint8 [N, K/4], q and z in 0..3, without zero points z = 2:

        bit    0 1 2 3 4 5 6 7
        q[k]   0 0 1 1 2 2 3 3

Symmetric, q - z is in -8..7, -4..3 or -2..1, and s may be negative, so that the number of largest magnitude is at the lowest
whatever its sign. The ops that use them are in fxc_kernels.int4_linear.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxc.errors import InputRefused
from fxc.schemes.checks import check_matrix, check_weight
from fxc.schemes.scheme import EMBEDDING, Product, Scheme, register
from fxc_kernels import embedding as _embedding  # noqa: F401 - registers its operators
from fxc_kernels.cpu import native_int4_quantize as native
from fxc_kernels.int4_linear import BITS, GROUPS, columns_of, dequantize, unit, unpack

__all__ = ["BITS", "GROUPS", "LINEAR", "SCHEME", "SCHEMES", "dequantize", "pack", "quantize_weight", "unpack"]

LINEAR = torch.ops.fxc.int4_weight_only_linear.default
LOOKUP = torch.ops.fxc.int4_embedding.default

# A group whose range is not above this counts as all zero: below it, 1/scale would overflow float32.
ZERO_GROUP = 1e-30
TRIES = 6


def pack(values: Tensor, bits: int = BITS) -> Tensor:
    """uint8 [..., K], values of so many bits -> uint8 [..., K * bits / 8]. `unpack` undoes it.

    Raises InputRefused for a K that fills no whole bytes, or values that the bits do not hold.
    """
    numbers, nbytes = unit(bits)
    if values.dtype != torch.uint8 or values.shape[-1] % numbers:
        what = "an even number" if numbers == 2 else f"a multiple of {numbers}"
        raise InputRefused(f"only {what} of uint8 values can be packed", why=f"{values.dtype}{list(values.shape)}")
    if (values >= 1 << bits).any():
        raise InputRefused(f"{bits} bits hold 0 to {(1 << bits) - 1}", why=f"the largest value is {int(values.max())}")
    units = values.unflatten(-1, (-1, numbers))
    units = units.int() if nbytes > 1 else units
    words = sum(units[..., at] << bits * at for at in range(numbers))
    return torch.stack([words >> 8 * at & 255 for at in range(nbytes)], dim=-1).flatten(-2).to(torch.uint8)


def quantize_weight(
    weight: Tensor, group: int, symmetric: bool, full_range: bool = True, bits: int = BITS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round `weight` [N, K] (any float dtype) to 2^bits levels: (packed uint8 [N, K * bits / 8], scale [N, K/group], zero or
    None).

    With r = 1 and 4 bits, symmetric: scale = r * m / -8, m the number of largest magnitude in the group with its sign, which
    is then exact and all levels are used; without `full_range` scale = r * |m| / 7. Asymmetric: scale = r * (hi - lo) / 15
    with lo <= 0 <= hi and zero = round(-r * lo / scale). Of six shares r, down to 3/4, with 3 bits 2/3 and with 2 bits 1/2,
    each group has the one with the least squared error: where few numbers are large it pays to cut them off. Groups of zeros
    have scale 1. The scale is float32, for a bfloat16 weight bfloat16, and it is that number which the weight is divided by.
    Raises InputRefused when the weight is not a float matrix, holds NaN or Inf, or when `group` does not divide K.
    """
    check_matrix(weight, f"int{bits}")
    if group not in GROUPS or weight.shape[1] % group:
        raise InputRefused(f"group={group} does not divide rows of {weight.shape[1]}", why=f"groups are {GROUPS}")
    kept = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    shares = [1 - step / ((TRIES - 1) * bits) for step in range(TRIES)]
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and native.why_not() is None:
        made = native.quantize(weight.contiguous(), group, bits, symmetric, full_range, kept, shares)
        if made is not None:
            levels, scale, zero = made
            return levels if bits == BITS else pack(levels, bits), scale, None if symmetric else zero
    check_weight(weight, f"int{bits}")
    values = weight.float().unflatten(1, (-1, group))
    best = least = None
    for share in shares:
        found = _rounded(values, share, symmetric, full_range, kept, bits)
        q, scale, zero = found
        error = _in_order((q - zero).mul_(scale).sub_(values).square_())
        if best is None:
            best, least = found, error
        else:
            best = tuple(torch.where(error < least, new, old) for new, old in zip(found, best, strict=True))
            least = torch.minimum(error, least)
    q, scale, zero = best
    packed = pack(q.to(torch.uint8).flatten(1), bits)
    return packed, scale.squeeze(-1).to(kept), None if symmetric else zero.squeeze(-1).to(torch.uint8)


def _in_order(squares: Tensor) -> Tensor:
    """The sums of groups [..., group] -> [..., 1], added in an order that every machine can keep: 16 apart, then by halves."""
    total, *others = squares.split(16, dim=-1)
    for each in others:
        total = total + each
    while total.shape[-1] > 1:
        first, second = total.chunk(2, dim=-1)
        total = first + second
    return total


def _rounded(
    values: Tensor, share: float, symmetric: bool, full_range: bool, kept: torch.dtype, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero) of the groups `values` [N, K/group, group], all float32, when `share` of their range is used."""
    top, middle = (1 << bits) - 1, 1 << bits - 1
    if symmetric:
        largest = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))
        span = largest.abs()
        scale = _scale(span, share * (largest / -middle if full_range else span / (top - middle)), kept)
        zero = torch.full_like(scale, middle)
    else:
        lo = values.amin(dim=-1, keepdim=True).clamp(max=0)
        span = values.amax(dim=-1, keepdim=True).clamp(min=0) - lo
        scale = _scale(span, share * span / top, kept)
        zero = (-share * lo / scale).round_().clamp_(0, top)
    return (values / scale).round_().add_(zero).clamp_(0, top), scale, zero


def _scale(span: Tensor, scale: Tensor, kept: torch.dtype) -> Tensor:
    """`scale` as the dtype `kept` holds it, in float32; 1 where the group is zero."""
    return torch.where(span <= ZERO_GROUP, 1.0, scale).to(kept).float()


def _dense(bits: int, qweight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return dequantize(qweight, scale, zero, columns_of(qweight, bits) // scale.shape[1], bits)


def _scheme(bits: int) -> Scheme:
    name = f"int{bits}"
    linear = getattr(torch.ops.fxc, f"{name}_weight_only_linear").default
    lookup = (Product(LOOKUP, "int4_embedding", "int4 embedding", layer=EMBEDDING),) if bits == BITS else ()
    return Scheme(
        name=name,
        label=name,
        parts={"qweight": None, "scale": "scales", "zero": "zero points"},
        products=(Product(linear, f"{name}_g{{group}}", f"{name} linear"), *lookup),
        quantize=functools.partial(quantize_weight, bits=bits),
        dequantize=functools.partial(_dense, bits),
        options={"group": GROUPS, "symmetric": (True, False), "full_range": (True, False)},
        multiple=lambda group, **_: (group, "a group"),
        has_signed_scales=True,
        levels=lambda qweight: (unpack(qweight, bits), 0, (1 << bits) - 1),
        stored=lambda levels, parts: pack(levels.to(torch.uint8), bits),
    )


SCHEMES = {bits: register(_scheme(bits)) for bits in (4, 3, 2)}
"""Bits -> the format."""
SCHEME = SCHEMES[BITS]
