"""Weights trained by a product of two thin matrices that is added to them (LoRA, Hu et al., arXiv 2106.09685), and merged.

It is added before a weight is masked and rounded, so that zeros stay zero and levels are levels: what is merged is what was
trained. The optimizer has two numbers for each of the thin matrices, and none for the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxc.errors import UsageError
from fxc.ir.program import users_of
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import product_of
from fxc.train.latent import Latent, Thin
from fxc.train.reparametrize import kind_of, reparametrize, undo
from fxc.train.trainable import Trainable

# What is not trained while something is added to it.
BASE = "base"


class LowRank(nn.Module):
    """weight + B A, of matrices [N, K], of experts each its own: b [E, N, R], zero at first, and a [E, R, K], drawn so that a
    step of b changes the weight by as much as such a step of its own. places: of a weight that stores some numbers of the
    matrix only, which."""

    def __init__(
        self, shape: tuple[int, int, int], rank: int, generator: torch.Generator, places: Tensor | None = None
    ) -> None:
        super().__init__()
        experts, rows, columns = shape
        self.b = nn.Parameter(torch.zeros(experts, rows, rank))
        self.a = nn.Parameter(torch.randn(experts, rank, columns, generator=generator) / math.sqrt(rank))
        self.register_buffer("places", places)

    def forward(self, weight: Tensor) -> Tensor:
        added = self.b @ self.a
        if self.places is not None:
            added = added.flatten()[self.places]
        return weight + added.view(weight.shape).to(weight.dtype)


def adapt(student: Trainable, rank: int, seed: int = 0) -> list[str]:
    """From now on weights are trained through `LowRank` where that has fewer numbers than they have, in place. The names of
    these. Raises UsageError where there are none."""
    adapted = []
    for number, (name, latent) in enumerate(student.latents.items()):
        shape = _shape(student, name, latent)
        if kind_of(latent) != "weight" or rank * (shape[1] + shape[2]) >= shape[1] * shape[2]:
            continue
        generator = torch.Generator().manual_seed(seed + number)
        places = _places(latent) if isinstance(latent, Thin) else None
        by = LowRank(shape, rank, generator, places)
        reparametrize(latent, by, {"original": BASE, "0.a": "weight", "0.b": "weight"})
        adapted.append(name)
    if not adapted:
        what = f"lora={rank} has no fewer numbers than the weight of any layer"
        raise UsageError(what, where="recover", hint="a smaller rank, or all weights without lora")
    return adapted


def merge(student: Trainable, adapted: list[str]) -> None:
    """Add what was trained to the weights of these names."""
    for name in adapted:
        undo(student.latents[name])


def _shape(student: Trainable, name: str, latent: Latent) -> tuple[int, int, int]:
    """(experts, rows, columns): of anything but a mixture one expert, of a convolution a row for each output channel."""
    with torch.no_grad():
        shape = latent().shape
    readers = users_of(student.program, name)
    products = [product.layer if (product := product_of(node.target)) else node.target for node in readers]
    if GROUPED_LINEAR in products:
        return tuple(shape)
    return 1, shape[0] if shape else 1, math.prod(shape[1:])


@torch.no_grad()
def _places(latent: Thin) -> Tensor:
    """Of each stored number, which of the matrix it is."""
    stored = latent.numbers.weight
    numbered = torch.arange(1, stored.numel() + 1, dtype=torch.float64).view(stored.shape)
    dense = latent.dense(numbered).flatten().long()
    places = torch.empty(stored.numel() + 1, dtype=torch.long)
    places[dense] = torch.arange(dense.numel())
    return places[1:]
