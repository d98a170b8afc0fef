"""Pruning in several rounds, what stays fitted anew after each: by far the best of what is here for a share of all numbers.

As Boža ("Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938): the share that goes grows as
1 - (1 - t/T)^3 (Zhu and Gupta, arXiv 1710.01878), and in each round those go that cost least by Optimal Brain Surgeon,
w^2 / (H^-1)[k, k], from the weight as `refit` left it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import inverse_factor
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.levels import checked
from fxc.calibrate.masks import Pruned, keep_share
from fxc.calibrate.refit import STEPS, refit

ROUNDS = 8


def gradual(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.5, *, by_row: bool = False, damp: float = DAMP, rounds: int = ROUNDS
) -> Pruned:
    """Prune the share `sparsity` of `weight` [N, K], of each row or of the whole, for an input with `hessian` [K, K].

    damp as in `gptq`. Raises InputRefused for a sparsity that is not from 0 up to 1, for what is no weight, or statistics of
    another width or not finite.
    """
    values = checked(weight, hessian)
    # The diagonal of H^-1 = U^T U.
    freedom = inverse_factor(hessian, damp).square().sum(0)
    made = values
    keep = torch.ones_like(values, dtype=torch.bool)
    for left in reversed(range(rounds)):
        cost = (made.square() / freedom).masked_fill(~keep, -1.0)
        keep = keep_share(cost, sparsity * (1 - (left / rounds) ** 3), by_row)
        found = refit(values, keep, hessian, damp=damp, steps=STEPS // 3 if left else STEPS)
        made = found.weight
    return found
