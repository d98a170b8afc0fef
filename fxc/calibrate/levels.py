"""The levels that a quantized weight can have, and a weight that was quantized to them.

    w[n, k] ~= scale[n, g] * (q[n, k] - zero[n, g])        g = k // group, q in 0 .. 2^bits - 1

Symmetric levels have no zero: it is the middle, 2^(bits-1). With `full_range` the number of largest magnitude in a group is the
lowest level, so that all levels are used and this number is exact; the scale is negative where that number is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxc.errors import InputRefused

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)
# A group whose range is not above this counts as all zero: below it, 1/scale would overflow float32.
ZERO_GROUP = 1e-30


@dataclass(frozen=True)
class Levels:
    """bits: 2, 3, 4 or 8; group: 32, 64, 128, or -1 for a whole row; kept: the dtype that scales are stored in; balanced:
    as many levels below zero as above it, for symmetric levels without full range.

    Raises InputRefused for other bits and groups.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    full_range: bool = True
    kept: torch.dtype = torch.float32
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputRefused(f"weights of {self.bits} bits cannot be made", why=f"bits are {BITS}")
        if self.group not in GROUPS:
            raise InputRefused(f"groups of {self.group} cannot be made", why=f"groups are {GROUPS}, -1 for a whole row")

    @property
    def least(self) -> int:
        return int(self.balanced)

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def width(self, columns: int) -> int:
        """How many columns share a scale, of `columns`. Raises InputRefused when groups do not divide them."""
        width = columns if self.group == -1 else self.group
        if columns == 0 or columns % width:
            others = f"use another of the groups {GROUPS}, -1 for a whole row"
            raise InputRefused(f"groups of {width} do not divide rows of {columns}", hint=others)
        return width

    def stored(self, scale: Tensor) -> Tensor:
        """`scale` as `kept` holds it, in float32; 1 where it is too small to divide by."""
        held = scale.to(self.kept).float()
        return torch.where(held.abs() <= ZERO_GROUP, 1.0, held)

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest level of each of `values`, as a float32 number least .. largest; `scale` and `zero` broadcast."""
        return (values / scale).round_().add_(self.middle if zero is None else zero).clamp_(self.least, self.largest)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What levels stand for, float32: `codes` undone; `scale` and `zero` broadcast."""
        return (codes - (self.middle if zero is None else zero)) * scale


@dataclass(frozen=True)
class Quantized:
    """q: uint8 [N, K]; scale: [N, K / group] as `levels.kept`; zero: uint8 [N, K / group], None for symmetric levels.

    error: what is lost of the layer's output, as a share of its energy: tr(D H D^T) / tr(W H W^T), D the change of the weight
    and H = 2/n X^T X of what the layer reads, or only H's diagonal where an algorithm has no more.
    """

    levels: Levels
    q: Tensor
    scale: Tensor
    zero: Tensor | None
    error: float

    def dense(self) -> Tensor:
        """The weight that the levels stand for, float32 [N, K]."""
        width = self.levels.width(self.q.shape[1])
        zero = None if self.zero is None else self.zero.float().unsqueeze(-1)
        groups = self.q.float().unflatten(1, (-1, width))
        return self.levels.values(groups, self.scale.float().unsqueeze(-1), zero).flatten(1)


def checked(weight: Tensor, curvature: Tensor | None = None) -> Tensor:
    """`weight` [N, K] in float32. Raises InputRefused unless it is a matrix of finite floating-point numbers, and `curvature`
    (a Hessian [K, K] or its diagonal [K]) finite and of its width."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputRefused("only a floating-point matrix can be compressed", why=f"{weight.dtype}{list(weight.shape)}")
    values = weight.detach().float()
    if not values.isfinite().all():
        raise InputRefused("the weight holds NaN or Inf", hint="check the checkpoint, or leave this layer out with skip=")
    if curvature is not None:
        columns = weight.shape[1]
        if curvature.shape not in ((columns,), (columns, columns)):
            raise InputRefused(f"statistics {list(curvature.shape)} are not those of a layer that reads {columns} channels")
        if not curvature.isfinite().all():
            raise InputRefused("the statistics of a layer's input hold NaN or Inf", hint="a float32 model may not overflow")
    return values


def energy(rows: Tensor, curvature: Tensor) -> float:
    """tr(R H R^T) of `rows` [N, K] and H [K, K], or its diagonal [K]: the energy of a layer's output. Summed in float64."""
    spread = rows @ curvature.to(rows.dtype) if curvature.dim() == 2 else rows * curvature.to(rows.dtype)
    return float((spread * rows).sum(dtype=torch.float64))


def lost(weight: Tensor, made: Tensor, curvature: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) of D = made - weight; 0 where the layer gives nothing."""
    whole = energy(weight, curvature)
    return energy(made - weight, curvature) / whole if whole > 0 else 0.0
