"""Qronos (Zhang et al., "Qronos: Correcting the Past by Shaping the Future...", arXiv 2505.11695).

The layer reads x, where it would read y if the layers before it were not compressed. First the weight is corrected for that
by least squares, then it is quantized as in GPTQ. With H = 2/n X^T X and G = 2/n X^T Y

    min_v |Y w - X v|^2   has   v = w + H^-1 (G - H) w

and since |Y w - X q|^2 = n/2 (q - v)^T H (q - v) + what no q can change, GPTQ on v is what is left to do. The correction is
damped towards w, not towards zero. (The paper rounds the first column before it corrects; here all are treated alike.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.calibrate.columns import BLOCK, cholesky
from fxc.calibrate.gptq import DAMP, gptq
from fxc.calibrate.grid import Scales
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.levels import Levels, Quantized, checked, energy
from fxc.errors import InputRefused

CORRECTION_DAMP = 1e-3


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor, damp: float = CORRECTION_DAMP) -> Tensor:
    """The float32 weight [N, K] that gives from X what `weight` gives from Y, as nearly as can be.

    hessian, cross [K, K]: H and G of `hessian.Hessian`. damp: share of H's mean diagonal, as in `gptq`.
    Raises InputRefused for what is no weight, or statistics of another width or not finite.
    """
    values = checked(weight, hessian)
    if cross.shape != hessian.shape or not cross.isfinite().all():
        raise InputRefused("the cross statistic is not finite, or not of this layer", why=f"{list(cross.shape)}")
    drift = (cross - hessian) @ values.t().to(hessian.dtype)
    return values + torch.cholesky_solve(drift, cholesky(hessian, damp)).t().float()


def qronos(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    levels: Levels,
    scales: Scales | None = None,
    *,
    keep: Tensor | None = None,
    correction_damp: float = CORRECTION_DAMP,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Quantized:
    """Correct, then `gptq`, whose arguments these are. The error is that of rounding, against the corrected weight.

    scales default to those of the corrected weight's groups.
    """
    aim = corrected(weight, hessian, cross, correction_damp)
    return gptq(aim, hessian, levels, scales, keep=keep, damp=damp, block=block)


def missed(weight: Tensor, made: Tensor, streams: Hessian) -> float:
    """|Y w - X m|^2 / |Y w|^2 of `weight` and `made` [N, K]: what is lost of what the layer gives in the uncompressed model."""
    whole = energy(weight, streams.uncompressed)
    mixed = ((made @ streams.cross.to(made.dtype)) * weight).sum(dtype=torch.float64)
    return max(0.0, energy(made, streams.mean) - 2 * float(mixed) + whole) / whole if whole > 0 else 0.0
