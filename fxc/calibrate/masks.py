"""Which numbers of a weight stay, by a score for each: N of M that lie side by side, or a share of a row or of the layer.

Masks are bool, True for what stays. Of equal scores the one that comes first stays.
"""

from __future__ import annotations

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
    # 0.9 of 10 is 9, which floats do not know.
    gone = int(sparsity * flat.shape[1] + 1e-9)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order[:, : flat.shape[1] - gone], True)
    return keep.view_as(scores)


def pruned(weight: Tensor, keep: Tensor, curvature: Tensor) -> Pruned:
    """`weight` [N, K] where `keep`, and zero elsewhere. curvature: H [K, K] or its diagonal, to tell the error."""
    values = checked(weight, curvature)
    made = torch.where(keep, values, 0.0)
    return Pruned(made, keep, lost(values, made, curvature))
