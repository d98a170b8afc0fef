"""How much of each layer goes when the numbers of all layers are ranked together.

Scores of different layers are no one unit: a layer of small numbers would go whole. As in LAMP (Lee et al., "Layer-adaptive
Sparsity for the Magnitude-based Pruning", arXiv 2010.07611) a squared score counts as a share of the sum of those in its layer
that are not smaller: what its going would cost the layer, when all before it are gone. Within a layer the order stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A float32 that is not negative grows with its bits: of so many classes two neighbours are less than one part in 128 apart.
CLASSES = 1 << 15


def relative(squares: Tensor) -> Tensor:
    """`squares` of any shape, each as a share of the sum of those that are not smaller, in its dtype; 0 for 0."""
    values, order = squares.flatten().double().sort(stable=True)
    left = values.flip(0).cumsum(0).flip(0)
    shares = torch.where(left > 0, values / left, 0.0)
    return torch.empty_like(shares).scatter_(0, order, shares).view_as(squares).to(squares.dtype)


class Ranking:
    """Counts scores by their size, layer by layer: what is kept of a layer does not grow with it."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, scores: Tensor) -> None:
        """Count in the `scores` of (a part of) the layer `name`, of any shape, none negative."""
        classes = scores.detach().flatten().float().contiguous().view(torch.int32).long() >> 16
        counts = torch.bincount(classes.cpu(), minlength=CLASSES)
        self.counts[name] = self.counts.get(name, 0) + counts

    def shares(self, sparsity: float) -> dict[str, float]:
        """The share of each layer that is among the lowest `sparsity` of all; within one class all layers give alike. At least
        one number of each layer stays."""
        if not self.counts:
            return {}
        whole = torch.stack(list(self.counts.values())).sum(0)
        below = whole.cumsum(0)
        gone = sparsity * int(below[-1])
        edge = int(torch.searchsorted(below.double(), torch.tensor(gone, dtype=torch.double)))
        inside = (gone - int(below[edge] - whole[edge])) / max(int(whole[edge]), 1)
        found = {}
        for name, counts in self.counts.items():
            total = int(counts.sum())
            lost = int(counts[:edge].sum()) + inside * int(counts[edge])
            found[name] = min(lost, total - 1) / total
        return found
