"""Small layers with inputs, for the algorithms that compress weights, and what such algorithms minimise, in float64."""

import torch
from torch import Tensor


def layer(rows: int = 6, columns: int = 64, samples: int = 300, seed: int = 0, dead: int = 0, rank: int = 0):
    """(weight [rows, columns], inputs [samples, columns]), float32: channels of uneven size that depend on each other.

    dead: the first so many channels are zero; rank: the inputs span so many dimensions only (0: all).
    """
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank or columns, columns, generator=made)
    inputs = torch.randn(samples, len(mixed), generator=made) @ mixed
    inputs = (inputs + 2 * inputs.roll(1, 1)) * torch.rand(columns, generator=made).add(0.1)
    inputs[:, :dead] = 0
    return torch.randn(rows, columns, generator=made), inputs


def hessian_of(inputs: Tensor) -> Tensor:
    """2/n X^T X in float64."""
    x = inputs.double()
    return 2 * x.t() @ x / len(x)


def output_loss(weight: Tensor, made: Tensor, inputs: Tensor) -> float:
    """|X (W - M)|^2 / |X W|^2 in float64."""
    x, w = inputs.double(), weight.double()
    return float((x @ (w - made.double()).t()).square().sum() / (x @ w.t()).square().sum())
