"""Rotations that spread what stands out in one channel over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(size: int, seed: int = 0) -> Tensor:
    """An orthogonal float64 [size, size]: D H, a Hadamard matrix with random signs. Where `size` is no power of two, H is the
    Kronecker product of a random rotation with the Hadamard matrix of the largest power of two that divides it."""
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(power)
    if size > power:
        other = torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)
        matrix = torch.kron(torch.linalg.qr(other).Q.contiguous(), matrix)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix
