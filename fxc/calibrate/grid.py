"""Scales: of the largest number in a group, or the best of about 200 by the error that the layer's input gives weight to.

The search is llama.cpp's "importance matrix", which the code of AutoRound (Cheng et al., "Optimize Weight Rounding via Signed
Gradient Descent for the Quantization of LLMs", arXiv 2309.05516) calls "opt-rtn": per group, minimise over scale (and zero)

    sum_k E[x_k^2] (w_k - scale * (q_k - zero))^2

It needs one number a channel, and no Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.levels import Levels, Quantized, checked, lost

# Symmetric: so many shares of the range, for each end that the largest number can be.
SHARES, RANGE = 100, (0.3, 1.3)
# Not symmetric: so many shares of the one end of the range, by as many of the other.
ENDS = 14
REFINEMENTS = 3
# Rows are searched in pieces of about this many numbers, which stay in a core's cache.
PIECE = 1 << 16
Scales = tuple[Tensor, Tensor | None]


def nearest_scales(weight: Tensor, levels: Levels) -> Scales:
    """(scale float32 [N, K / group], zero float32 or None) from the range of each group of `weight` [N, K].

    Symmetric: the number of largest magnitude, with its sign, over -2^(bits-1); without full range its magnitude over
    2^(bits-1) - 0.5, of balanced levels over 2^(bits-1) - 1. Not symmetric: (hi - lo) / (2^bits - 1) with lo <= 0 <= hi,
    zero = round(-lo / scale). A group of zeros has scale 1. Raises InputRefused when groups do not divide K, or for a weight
    that is no matrix of finite numbers.
    """
    return _by_range(_grouped(checked(weight), levels), levels)


def grid_scales(weight: Tensor, levels: Levels, importance: Tensor | None = None) -> Scales:
    """Like `nearest_scales`, but the best of about 200 scales (and zeros) for each group, then refined by least squares.

    `importance`: [K], E[x^2], or [N, K] by row as well; none counts all the same. Never worse than nearest in this measure.
    """
    importance_by_row = importance is not None and importance.dim() == 2
    values = checked(weight, None if importance_by_row else importance)
    groups = _grouped(values, levels)
    rows, columns = values.shape
    if importance is None:
        importance = torch.ones(columns, device=values.device)
    weights = importance.detach().float().expand(rows, columns).unflatten(1, (-1, groups.shape[-1]))
    # A group that no input reaches is rounded for all inputs alike.
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    step = max(1, PIECE // columns)
    pieces = [_searched(g, w, levels) for g, w in zip(groups.split(step), weights.split(step), strict=True)]
    scale = torch.cat([piece[0] for piece in pieces])
    return scale, None if levels.symmetric else torch.cat([piece[1] for piece in pieces])


def rounded(weight: Tensor, levels: Levels, scales: Scales, curvature: Tensor | None = None) -> Quantized:
    """Each number of `weight` [N, K] at its nearest level. `curvature`: H or its diagonal, only to tell the error."""
    values = checked(weight, curvature)
    scale, zero = (each if each is None else each.unsqueeze(-1) for each in scales)
    groups = _grouped(values, levels)
    codes = levels.codes(groups, scale, zero)
    made = levels.values(codes, scale, zero).flatten(1)
    if curvature is None:
        curvature = torch.ones(values.shape[1], device=values.device)
    return assembled(codes.flatten(1), scales, levels, lost(values, made, curvature))


def nearest(weight: Tensor, levels: Levels, curvature: Tensor | None = None) -> Quantized:
    """Round to nearest, scales from ranges: needs no data."""
    return rounded(weight, levels, nearest_scales(weight, levels), curvature)


def grid(weight: Tensor, levels: Levels, importance: Tensor) -> Quantized:
    """Round to nearest, scales found by `grid_scales`. `importance`: E[x^2] [K]."""
    return rounded(weight, levels, grid_scales(weight, levels, importance), importance)


def assembled(codes: Tensor, scales: Scales, levels: Levels, error: float) -> Quantized:
    """The record of float `codes` [N, K] and float `scales`, as they are stored."""
    scale, zero = scales
    zero = None if zero is None else zero.to(torch.uint8)
    return Quantized(levels, codes.to(torch.uint8), scale.to(levels.kept), zero, error)


def _grouped(values: Tensor, levels: Levels) -> Tensor:
    return values.unflatten(1, (-1, levels.width(values.shape[1])))


def _by_range(groups: Tensor, levels: Levels) -> Scales:
    """Of groups [N, G, group]: scale [N, G] and zero."""
    if not levels.symmetric:
        lo, hi = _ends(groups)
        return _between(lo, hi, levels)
    if levels.full_range:
        return levels.stored(_largest(groups) / -levels.middle), None
    return levels.stored(groups.abs().amax(-1) / (levels.middle - (1 if levels.balanced else 0.5))), None


def _largest(groups: Tensor) -> Tensor:
    """The number of largest magnitude in each group, with its sign."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _between(lo: Tensor, hi: Tensor, levels: Levels) -> Scales:
    scale = levels.stored((hi - lo) / levels.largest)
    return scale, (-lo / scale).round().clamp(0, levels.largest)


def _searched(groups: Tensor, weights: Tensor, levels: Levels) -> tuple[Tensor, Tensor | None]:
    best = _Best(groups, weights, levels, _by_range(groups, levels))
    if levels.symmetric:
        largest = _largest(groups)
        for end in (-levels.middle, levels.largest - levels.middle):
            for share in torch.linspace(*RANGE, SHARES).tolist():
                scale = levels.stored(share * largest / end)
                best.offer((scale if levels.full_range else scale.abs(), None))
    else:
        lo, hi = _ends(groups)
        # With fewer bits it pays to cut off more of the range.
        shares = torch.linspace(1 - 1.4 / levels.bits, 1.05, ENDS).tolist()
        for low in shares:
            for high in shares:
                best.offer(_between(low * lo, high * hi, levels))
    for _ in range(REFINEMENTS):
        best.refine()
    return best.scale, best.zero


class _Best:
    """The best scales so far for groups [N, G, group], by group."""

    def __init__(self, groups: Tensor, weights: Tensor, levels: Levels, first: Scales) -> None:
        self.groups, self.weights, self.levels = groups, weights, levels
        self.scale, self.zero = first
        self.error = self._error(first)

    def offer(self, scales: Scales) -> None:
        error = self._error(scales)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scales[0], self.scale)
        if self.zero is not None:
            self.zero = torch.where(better, scales[1], self.zero)

    def refine(self) -> None:
        """Offer the least-squares scale for the levels that the best one gives."""
        scale, zero = self.scale.unsqueeze(-1), None if self.zero is None else self.zero.unsqueeze(-1)
        steps = self.levels.values(self.levels.codes(self.groups, scale, zero), torch.ones_like(scale), zero)
        weighted = steps * self.weights
        ratio = (weighted * self.groups).sum(-1) / (weighted * steps).sum(-1)
        self.offer((self.levels.stored(torch.where(ratio.isfinite(), ratio, self.scale)), self.zero))

    def _error(self, scales: Scales) -> Tensor:
        scale, zero = scales[0].unsqueeze(-1), None if scales[1] is None else scales[1].unsqueeze(-1)
        made = self.levels.values(self.levels.codes(self.groups, scale, zero), scale, zero)
        return made.sub_(self.groups).square_().mul_(self.weights).sum(-1)
