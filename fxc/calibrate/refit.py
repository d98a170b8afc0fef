"""What stays of a pruned weight, fitted anew to what the layer gave: least squares over the numbers that a mask keeps.

Of each row w the v with v[k] = 0 outside of the mask that minimises (v - w)^T H (v - w). Boža ("Fast and Effective Weight
Update for Pruned Large Language Models", arXiv 2401.02938) solves this by ADMM; here it is conjugate gradients, all rows at
once, each step one product with H. A sweep such as SparseGPT's finds less: there only columns that come later make up for one
that goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import damped
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.levels import checked, lost
from fxc.calibrate.masks import Pruned

STEPS = 30


def refit(weight: Tensor, keep: Tensor, hessian: Tensor, *, damp: float = DAMP, steps: int = STEPS) -> Pruned:
    """`weight` [N, K] as it was before pruning, `keep` bool [N, K], `hessian` [K, K] = 2/n X^T X -> what should stay.

    damp: the share of H's mean diagonal that is added to it. Begins at the masked weight; none of the `steps` makes it worse.
    Raises InputRefused for what is no weight, or statistics of another width or not finite.
    """
    values = checked(weight, hessian)
    curvature = damped(hessian, damp).float()
    made = torch.where(keep, values, 0.0)
    made = made + change_of(keep, (values - made) @ curvature, curvature, steps)
    return Pruned(made, keep, lost(values, made, hessian))


def change_of(keep: Tensor, slope: Tensor, curvature: Tensor, steps: int = STEPS) -> Tensor:
    """Of each row g of `slope` the d with d[k] = 0 outside of `keep` that minimises d^T C d / 2 - g d, float32 [N, K].
    curvature: C [K, K], positive definite."""
    diagonal = curvature.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    made = torch.zeros_like(slope)
    left = torch.where(keep, slope, 0.0)
    scaled = left / diagonal
    direction, size = scaled, (left * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        along = torch.where(keep, direction @ curvature, 0.0)
        bend = (direction * along).sum(1, keepdim=True)
        # A row that is solved has nothing left to divide.
        stride = torch.where(bend > 0, size / bend, 0.0)
        made = made + stride * direction
        left = left - stride * along
        scaled = left / diagonal
        fresh = (left * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(size > 0, fresh / size, 0.0) * direction
        size = fresh
    return made
