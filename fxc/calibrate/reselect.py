"""Which n of m neighbours stay, decided anew when all other numbers of the row are known: block coordinate descent on the mask.

A sweep such as SparseGPT's chooses a group when the columns after it are still whole. Here, from where it ended, group after
group takes the best of all choices of n of its m numbers, with the values that are best for them, given all others:

    of (w - v)^T H (w - v), with b = H_gg v_g + (H (w - v))_g, the choice P with the largest  b_P^T (H_PP)^-1 b_P

No step can raise the error of a row. (ALPS, Meng et al., arXiv 2406.07831, minimises the same by ADMM.)
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from fxc.calibrate.columns import BLOCK, damped
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.levels import checked, lost
from fxc.calibrate.masks import Pruned

PASSES = 3


def reselect(
    weight: Tensor,
    first: Pruned,
    hessian: Tensor,
    pattern: tuple[int, int] = (2, 4),
    *,
    damp: float = DAMP,
    passes: int = PASSES,
    block: int = BLOCK,
) -> Pruned:
    """`first` from `weight` [N, K] by `hessian` [K, K], with other numbers of each group kept where those are better.

    pattern: (n, m); m divides K and the block. damp: as in `gptq`. Raises InputRefused for what is no weight, or statistics of
    another width or not finite.
    """
    values = checked(weight, hessian)
    kept, size = pattern
    curvature = damped(hessian, damp).float()
    choices = torch.tensor(list(combinations(range(size), kept)), device=values.device)
    made = first.weight.t().contiguous()
    slope = curvature @ (values.t() - made)
    columns, rows = made.shape
    for _ in range(passes):
        for begin in range(0, columns, block):
            end = min(begin + block, columns)
            changes = made.new_empty(end - begin, rows)
            for j in range(begin, end, size):
                own = curvature[j : j + size, j : j + size]
                wanted = own @ made[j : j + size] + slope[j : j + size]
                inside = own[choices[:, :, None], choices[:, None, :]]
                found = torch.linalg.solve(inside, wanted[choices])
                best = (found * wanted[choices]).sum(1).argmax(0)
                # [choices, kept, rows] -> of each row its best: where, and what.
                places = choices[best].t()
                new = torch.zeros_like(wanted).scatter_(0, places, found[best, :, torch.arange(rows)].t())
                changes[j - begin : j - begin + size] = new - made[j : j + size]
                made[j : j + size] = new
                slope[begin:end] -= curvature[begin:end, j : j + size] @ changes[j - begin : j - begin + size]
            slope[:begin] -= curvature[:begin, begin:end] @ changes
            slope[end:] -= curvature[end:, begin:end] @ changes
    found = made.t().contiguous()
    return Pruned(found, found != 0, lost(values, found, hessian))
