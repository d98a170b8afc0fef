"""The algorithms that prune one weight by what its layer reads, by the names that passes give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fxc.calibrate.columns import inverse_factor
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.gradual import gradual
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.masks import Pruned, keep_n_of_m, keep_share, pruned
from fxc.calibrate.refit import refit
from fxc.calibrate.reselect import reselect
from fxc.calibrate.sparsegpt import sparsegpt
from fxc.calibrate.wanda import scores

STATISTICS: Mapping[str, Callable[[int], Hessian | Squares]] = {
    "wanda": Squares,
    "sparsegpt": Hessian,
    "gradual": Hessian,
}
"""Of each criterion, what makes the statistic that it reads."""


def learned(
    criterion: str, weight: Tensor, statistic: Hessian | Squares, pattern: tuple[int, int] | None = None, sparsity: float = 0.5
) -> Pruned:
    """`weight` [N, K] by `criterion`, one of `STATISTICS`, and a statistic of what that makes.

    pattern: (n, m), n of m neighbours stay in each row; None: the share `sparsity` goes, of wanda that of each row.
    gradual, which knows no pattern, prunes in rounds, what stays fitted anew in each. What sparsegpt leaves is fitted once more
    to what the layer gave, and with a pattern also chosen anew, where that is better. Raises InputRefused as they do.
    """
    if criterion == "wanda":
        by = scores(weight, statistic.mean)
        keep = keep_share(by, sparsity, by_row=True) if pattern is None else keep_n_of_m(by, *pattern)
        return pruned(weight, keep, statistic.mean)
    if criterion == "gradual":
        return gradual(weight, statistic.mean, sparsity)
    first = sparsegpt(weight, statistic.mean, pattern, sparsity)
    found = min(refit(weight, first.keep, statistic.mean), first, key=_error)
    if pattern is not None:
        moved = reselect(weight, found, statistic.mean, pattern)
        found = min(refit(weight, moved.keep, statistic.mean), moved, found, key=_error)
    return found


def _error(made: Pruned) -> float:
    return made.error


def costs(criterion: str, weight: Tensor, statistic: Hessian | Squares) -> Tensor:
    """float32 [N, K]: what the output of the layer loses, squared, when one number goes: by wanda alone, by the others when the
    rest of its row makes up for it, w^2 / (H^-1)[k, k]."""
    if criterion == "wanda":
        return scores(weight, statistic.mean).square()
    return weight.detach().float().square() / inverse_factor(statistic.mean, DAMP).square().sum(0)
