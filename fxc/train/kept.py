"""What a teacher gave for samples that come again, so that it does not run for these."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxc import ranks
from fxc.memory import available

# What does not fit is computed again each time.
MOST_BYTES = 2 << 30
# Of the memory that is left when training begins.
SHARE = 0.25


class Kept:
    """Of samples by name, a tree of tensors whose first dimension is that of samples. bytes: how much is kept; most: how much
    may be, by default 2 GB and no more than a quarter of the memory that is left, of all processes together."""

    def __init__(self, most: int | None = None) -> None:
        left = available()
        share = MOST_BYTES if left is None else min(MOST_BYTES, int(SHARE * left))
        self.most = most if most is not None else share // ranks.count()
        self.bytes = 0
        self._values: dict[Hashable, object] = {}

    def of(self, names: Sequence[Hashable]) -> object | None:
        """Of a batch of samples, None where one is not there."""
        if not all(name in self._values for name in names):
            return None
        return tree_map(lambda *parts: torch.cat(parts), *(self._values[name] for name in names))

    def add(self, names: Sequence[Hashable], value: object, share: float) -> None:
        """Of a batch of samples, all with the same number of rows. share: how much of all that will come this is: where all of
        it is too much, nothing is kept, for a batch is of use only where each of its samples is there."""
        leaves = tree_leaves(value)
        size = sum(each.numel() * each.element_size() for each in leaves)
        if not leaves or size > share * self.most or any(not each.ndim or each.shape[0] % len(names) for each in leaves):
            return
        for at, name in enumerate(names):
            if name not in self._values:
                self._values[name] = tree_map(partial(_own, at, len(names)), value)
                self.bytes += size // len(names)


def _own(at: int, count: int, rows: Tensor) -> Tensor:
    return rows.chunk(count)[at].clone()
