"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323).

Columns are rounded one after the other, and those that are left make up for the error of each (`columns.sweep`). They
are visited by falling H[k, k] (activation order), but scales are those of the groups as the weight has them, decided
before the first column is rounded: what comes out is stored like any other weight, without an index of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import BLOCK, falling, inverse_factor, sweep
from fxc.calibrate.grid import Scales, assembled, nearest_scales
from fxc.calibrate.levels import Levels, Quantized, checked, lost

DAMP = 0.01


def gptq(
    weight: Tensor,
    hessian: Tensor,
    levels: Levels,
    scales: Scales | None = None,
    *,
    keep: Tensor | None = None,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Quantized:
    """Quantize `weight` [N, K] for a layer whose input has `hessian` [K, K] = 2/n X^T X.

    scales: of `nearest_scales` (the default) or `grid_scales`. keep: bool [N, K], what is False becomes exactly zero, and is
    made up for like an error of rounding. Columns that no input reached are rounded to nearest. damp: the share of H's mean
    diagonal that is added to it, grown tenfold until H can be factored.
    Raises InputRefused when groups do not divide K, for what is no weight, or statistics of another width or not finite.
    """
    values = checked(weight, hessian)
    scale, zero = nearest_scales(values, levels) if scales is None else scales
    order = falling(hessian)
    upper = inverse_factor(hessian[order][:, order], damp)
    group = (order // levels.width(values.shape[1])).tolist()
    scale_of, zero_of = scale.t().contiguous(), None if zero is None else zero.t().contiguous()
    kept = None if keep is None else keep[:, order].t().contiguous()
    codes = torch.empty_like(values)[:, order].t().contiguous()

    def settle(j: int, ahead: Tensor) -> Tensor:
        step, origin = scale_of[group[j]], None if zero_of is None else zero_of[group[j]]
        target = ahead[0] if kept is None else torch.where(kept[j], ahead[0], 0.0)
        codes[j] = levels.codes(target, step, origin)
        return levels.values(codes[j], step, origin)

    made = torch.empty_like(values)
    made[:, order] = sweep(values[:, order], upper, settle, block)
    placed = torch.empty_like(values)
    placed[:, order] = codes.t()
    return assembled(placed, (scale, zero), levels, lost(values, made, hessian))
