"""Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695).

A weight counts by its magnitude times the norm of what it reads, |w| * sqrt(E[x^2]), compared within a row. What goes is not
made up for. `masks` picks by these scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.levels import checked

# What channels that no input reached count for beside the others: they go first, the smallest of their weights before others.
UNREACHED = 1e-12


def scores(weight: Tensor, squares: Tensor) -> Tensor:
    """float32 [N, K] of `weight` [N, K] and `squares` [K], E[x^2]; magnitude alone where no input reached the layer.

    Raises InputRefused for what is no weight, or statistics of another width or not finite.
    """
    values = checked(weight, squares).abs()
    squares = squares.float()
    mean = squares.mean()
    return values * (squares / torch.where(mean > 0, mean, 1.0) + UNREACHED).sqrt()
