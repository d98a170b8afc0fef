"""Coordinate descent on a weight that is quantized: no level may be left that a neighbour would beat.

As in QuantEase (Behdin et al., arXiv 2309.01885), but from where GPTQ ended: in each pass every column takes the levels that
are best given all others, and before that the scales are fitted to the levels, all groups of a row at once by least squares
(COMQ, Zhang et al., arXiv 2403.07134, fits them one by one). Neither step can raise tr(D H D^T); zeros of a mask stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import BLOCK, damped
from fxc.calibrate.gptq import DAMP
from fxc.calibrate.grid import assembled
from fxc.calibrate.levels import Levels, Quantized, checked, lost

PASSES = 4
# The numbers of all A together, of as many rows as are fitted at a time.
FITTED = 1 << 25


def descend(
    weight: Tensor,
    hessian: Tensor,
    made: Quantized,
    *,
    keep: Tensor | None = None,
    damp: float = DAMP,
    passes: int = PASSES,
    block: int = BLOCK,
) -> Quantized:
    """`made` from `weight` [N, K], closer to it by `hessian` [K, K]: other scales and levels, the same zeros.

    keep: bool [N, K], what is False stays exactly zero. damp: as in `gptq`; a column that no input reached has only that.
    Costs about as much as `gptq` for each of `passes`. Raises InputRefused as that does.
    """
    values, levels = checked(weight, hessian), made.levels
    curvature = damped(hessian, damp).float()
    scale = made.scale.float()
    origin = torch.full_like(scale, levels.middle) if made.zero is None else made.zero.float()
    width = levels.width(values.shape[1])
    lowest = -origin.repeat_interleave(width, 1)
    steps = made.q.float() + lowest
    for _ in range(passes):
        scale = _fitted(values, curvature, steps, scale, levels)
        steps = _settled(values, curvature, steps, scale.repeat_interleave(width, 1), lowest, levels, keep, block)
    error = lost(values, steps * scale.repeat_interleave(width, 1), hessian)
    return assembled(steps - lowest, (scale, made.zero), levels, error)


def _fitted(values: Tensor, curvature: Tensor, steps: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """The scales [N, G] that are best for the steps c [N, K]: A s = b by row, A[g, h] = c_g^T H_gh c_h, b_g = c_g^T (H w)_g."""
    groups, width = scale.shape[1], steps.shape[1] // scale.shape[1]
    rows = max(FITTED // groups**2, 1)
    if len(values) > rows:
        parts = zip(values.split(rows), steps.split(rows), scale.split(rows), strict=True)
        return torch.cat([_fitted(some, curvature, *others, levels) for some, *others in parts])

    def by_group(products: Tensor) -> Tensor:
        return (products * steps).unflatten(1, (groups, width)).sum(-1)

    parts = (steps[:, at : at + width] @ curvature[at : at + width] for at in range(0, steps.shape[1], width))
    matrix = torch.stack([by_group(part) for part in parts], 1)
    # A group without steps has no say in its scale.
    ridge = matrix.diagonal(dim1=1, dim2=2) * 1e-6 + 1e-12
    found = torch.linalg.solve(matrix + torch.diag_embed(ridge), by_group(values @ curvature).unsqueeze(-1)).squeeze(-1)
    usable = found.isfinite() & (matrix.diagonal(dim1=1, dim2=2) > 0)
    if not levels.full_range:
        usable &= found > 0
    found = torch.where(usable, levels.stored(found), scale)

    def loss(scales: Tensor) -> Tensor:
        gap = steps * scales.repeat_interleave(width, 1) - values
        return ((gap @ curvature) * gap).sum(1, keepdim=True)

    return torch.where(loss(found) < loss(scale), found, scale)


def _settled(
    values: Tensor,
    curvature: Tensor,
    steps: Tensor,
    scale: Tensor,
    lowest: Tensor,
    levels: Levels,
    keep: Tensor | None,
    block: int,
) -> Tensor:
    """One pass over the columns. scale, lowest: [N, K], of each number its scale and the step of level 0."""
    scale, lowest, steps = (each.t().contiguous() for each in (scale, lowest, steps))
    kept = None if keep is None else keep.t()
    made = steps * scale
    # What is left to do: H (w - made), by column.
    slope = curvature @ (values.t() - made)
    columns, rows = made.shape
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        changes = made.new_empty(end - begin, rows)
        for j in range(begin, end):
            best = ((made[j] + slope[j] / curvature[j, j]) / scale[j]).round_()
            best = torch.clamp(best, lowest[j] + levels.least, lowest[j] + levels.largest)
            if kept is not None:
                best = torch.where(kept[j], best, 0.0)
            changes[j - begin] = best * scale[j] - made[j]
            made[j], steps[j] = best * scale[j], best
            slope[begin:end].addr_(curvature[j, begin:end], changes[j - begin], alpha=-1)
        slope[:begin].addmm_(curvature[:begin, begin:end], changes, alpha=-1)
        slope[end:].addmm_(curvature[end:, begin:end], changes, alpha=-1)
    return steps.t()
