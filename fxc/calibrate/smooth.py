"""SmoothQuant (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438).

Only the scale s of each channel: x / s is quantized where x was, and the weights that read it become w * s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc.calibrate.levels import checked
from fxc.errors import InputRefused


def smooth(weights: Sequence[Tensor], largest: Tensor, alpha: float = 0.5) -> Tensor:
    """s = max|x|^alpha / max|w|^(1-alpha) by channel, float32 [K]; 1 for a channel that nothing reaches or nothing reads.

    weights: each [N, K], all that read the activation; largest: [K], the largest |x| of each channel; alpha from 0 to 1.
    Raises InputRefused for another alpha, for what is no weight, or statistics of another width or not finite.
    """
    if not 0 <= alpha <= 1:
        raise InputRefused(f"alpha={alpha} is not from 0 to 1")
    reads = torch.stack([checked(weight, largest).abs().amax(0) for weight in weights]).amax(0)
    largest = largest.float()
    scale = largest.pow(alpha) / reads.pow(1 - alpha)
    return torch.where((largest > 0) & (reads > 0) & scale.isfinite() & (scale > 0), scale, 1.0)
