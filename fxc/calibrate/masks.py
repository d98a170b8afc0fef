"""Which numbers of a weight stay, by a score for each: N of M that lie side by side, or a share of a row or of the layer.

Masks are bool, True for what stays. Of equal scores the one that comes first stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxc.calibrate.levels import checked, lost
from fxc.errors import InputRefused


@dataclass(frozen=True)
class Pruned:
    """weight: float32 [N, K], zero where nothing was kept; keep: bool [N, K]; error as in `levels.Quantized`."""

    weight: Tensor
    keep: Tensor
    error: float


def keep_n_of_m(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The n highest of each m scores along the last dimension of [*, K]. Raises InputRefused when m does not divide K."""
    if not 0 < n <= m or scores.shape[-1] % m:
        raise InputRefused(f"{n} of {m} cannot be kept in rows of {scores.shape[-1]}", hint="m must divide the row")
    groups = scores.unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(-2)


def keep_share(scores: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """All but the lowest floor(sparsity * count) scores of each row of [N, K], or of the whole; 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise InputRefused(f"sparsity={sparsity} is not from 0 up to 1")
    flat = scores if by_row else scores.reshape(1, -1)
    gone = _gone(sparsity, flat.shape[1])
    order = flat.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order[:, : flat.shape[1] - gone], True)
    return keep.view_as(scores)


def keep_share_of_pieces(scores: Callable[[], Iterable[Tensor]], sparsity: float, count: int) -> Iterator[Tensor]:
    """What `keep_share` says of `count` scores as a whole, of those of one piece after the other. scores: gives the pieces anew
    each time, float32 and not negative; that is three times, and nothing is sorted: by its bits, half of them at a time, the
    lowest score that stays is counted out."""
    gone, first = _gone(sparsity, count), torch.zeros(1 << 16, dtype=torch.int64)
    for piece in scores():
        first += torch.bincount(_bits(piece) >> 16, minlength=len(first))
    high = int((first.cumsum(0) > gone).int().argmax())
    gone -= int(first[:high].sum())
    second = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in scores():
        bits = _bits(piece)
        second += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=len(second))
    low = int((second.cumsum(0) > gone).int().argmax())
    equal = int(second[low]) - (gone - int(second[:low].sum()))
    for piece in scores():
        bits = _bits(piece)
        at = bits == (high << 16) + low
        keep = (bits > (high << 16) + low) | (at & (at.cumsum(0) <= equal))
        equal -= int((keep & at).sum())
        yield keep.view(piece.shape)


def _gone(sparsity: float, count: int) -> int:
    # 0.9 of 10 is 9, which floats do not know.
    return int(sparsity * count + 1e-9)


def _bits(scores: Tensor) -> Tensor:
    """int32 [n], in the same order as float32 scores that are not negative."""
    return scores.contiguous().flatten().view(torch.int32)


def pruned(weight: Tensor, keep: Tensor, curvature: Tensor) -> Pruned:
    """`weight` [N, K] where `keep`, and zero elsewhere. curvature: H [K, K] or its diagonal, to tell the error."""
    values = checked(weight, curvature)
    made = torch.where(keep, values, 0.0)
    return Pruned(made, keep, lost(values, made, curvature))
