"""SparseGPT (Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774).

The sweep of GPTQ, in the order of the columns, but numbers become zero instead of rounded. When the turn of a group of m
columns (or of 32) comes, it is as the columns before it have left it, and those numbers go that cost least,
w^2 / U[k, k]^2. To quantize as well, give the mask to `gptq(keep=...)` with the weight as it was: one solve makes up for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import BLOCK, inverse_factor, sweep
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.levels import checked, lost
from fxc.calibrate.masks import Pruned, keep_n_of_m, keep_share
from fxc.errors import InputRefused

# Without a pattern, what goes is chosen for so many columns at a time: the fewer, the more of the errors is known by then.
CHOSEN = 32


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: tuple[int, int] | None = (2, 4),
    sparsity: float = 0.5,
    *,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Pruned:
    """Prune `weight` [N, K] for a layer whose input has `hessian` [K, K] = 2/n X^T X.

    pattern: (n, m), n of m columns side by side stay in each row; None: of each 32 columns, over all rows, the share
    `sparsity` goes. damp as in `gptq`. Where no input reached the layer, the smallest numbers go.
    Raises InputRefused when m does not divide K or the block, for what is no weight, or statistics that are not finite.
    """
    values = checked(weight, hessian)
    step = min(block, CHOSEN) if pattern is None else pattern[1]
    if block % step:
        raise InputRefused(f"blocks of {block} columns do not hold groups of {step} whole")
    if pattern is not None and values.shape[1] % step:
        raise InputRefused(f"{pattern[0]} of {step} cannot be kept in rows of {values.shape[1]}", hint="m must divide the row")
    upper = inverse_factor(hessian, damp)
    cost = upper.diagonal().square().reciprocal()
    keep = torch.empty(values.shape[::-1], dtype=torch.bool, device=values.device)

    def settle(j: int, ahead: Tensor) -> Tensor:
        if j % step == 0:
            new = ahead[:step]
            scores = new.square() * cost[j : j + len(new), None]
            chosen = keep_share(scores, sparsity, by_row=False) if pattern is None else keep_n_of_m(scores.t(), *pattern).t()
            keep[j : j + len(new)] = chosen
        return torch.where(keep[j], ahead[0], 0.0)

    made = sweep(values, upper, settle, block)
    return Pruned(made, keep.t().contiguous(), lost(values, made, hessian))
