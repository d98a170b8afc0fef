"""AWQ (Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978).

Only the search for the scale s of each channel: x / s is read where x was, and the weights that read it become w * s, which are
quantized more finely where x is large. What s costs is told by H: |X (w - Q(w * s) / s)|^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc.calibrate.grid import nearest
from fxc.calibrate.levels import Levels, checked, energy

STEPS = 20


def awq(weights: Sequence[Tensor], size: Tensor, curvature: Tensor, levels: Levels) -> tuple[Tensor, float]:
    """(s float32 [K], its error): the best of s = 1 and s = mean|x|^r / (mean|w|^(1-r) + 1e-4), r = 0, 1/20 .. 19/20.

    weights: each [N, K], all that read the activation; size: [K], mean |x|; curvature: H [K, K] or its diagonal. Each s is
    divided by the geometric mean of its ends. mean|w|: of |w| over the largest in its group. error as in `levels.Quantized`,
    of all weights together, rounded to nearest.
    Raises InputRefused when groups do not divide K, for what is no weight, or statistics that are not finite.
    """
    values = [checked(weight, curvature) for weight in weights]
    checked(values[0], size)
    whole = sum(energy(weight, curvature) for weight in values)
    size = size.float().clamp(min=1e-4)
    reads = torch.cat([_share(weight, levels) for weight in values]).mean(0)
    best, least = torch.ones_like(size), _error(values, torch.ones_like(size), curvature, levels)
    for step in range(STEPS):
        ratio = step / STEPS
        scale = (size.pow(ratio) / (reads.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        error = _error(values, scale, curvature, levels)
        if error < least:
            best, least = scale, error
    return best, least / whole if whole > 0 else 0.0


def _share(weight: Tensor, levels: Levels) -> Tensor:
    """|w| over the largest of its group, [N, K]."""
    groups = weight.abs().unflatten(1, (-1, levels.width(weight.shape[1])))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(1)


def _error(weights: list[Tensor], scale: Tensor, curvature: Tensor, levels: Levels) -> float:
    return sum(energy(nearest(weight * scale, levels).dense() / scale - weight, curvature) for weight in weights)
