"""Gate and up as one weight whose rows alternate, so that one product gives silu(gate) * up without writing either.

    row      0    1    2    3   ...  2 F - 2   2 F - 1
    holds    g0   u0   g1   u1         gF-1      uF-1

A tile of the product then has both numbers of a pair side by side. `silu_mul` is the meaning of the kernels' activation
"silu_mul".
"""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up, both [F, ...], as one [2 F, ...]: row 2 i is gate's i-th and row 2 i + 1 up's. For everything that has a row
    or a number for each output: a weight's numbers, scales, zero points, sums of rows, the bias."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} must be alike")
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def silu_mul(product: Tensor) -> Tensor:
    """product [..., 2 F], gate and up alternating -> silu(gate) * up [..., F], computed in float32 and rounded once."""
    gate, up = product.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (torch.nn.functional.silu(gate) * up).to(product.dtype)
