"""Weights of one byte a number with one float32 scale for each row: what their operators take."""

import torch
from torch import Tensor


def check(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """x float [..., K], qweight `dtype` [N, K], scale float32 [N], bias [N] or None.

    Raises TypeError on a wrong dtype and ValueError on a wrong shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if qweight.dtype != dtype or scale.dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise TypeError(f"qweight must be {name} and scale float32, got {qweight.dtype} and {scale.dtype}")
    if x.dim() < 1 or qweight.dim() != 2 or x.shape[-1] != qweight.shape[1]:
        raise ValueError(f"x [..., K] and qweight [N, K] do not fit: {tuple(x.shape)} and {tuple(qweight.shape)}")
    rows = qweight.shape[0]
    if tuple(scale.shape) != (rows,) or (bias is not None and tuple(bias.shape) != (rows,)):
        raise ValueError(f"scale and bias must have shape ({rows},)")
