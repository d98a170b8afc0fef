"""Samples in batches: the same for the same seed, and the one of any step without those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc.ir.program import Program

Sample = Sequence[Tensor]


class Batches:
    """samples: inputs of `program`, one by one; size: how many in a batch. Each epoch takes all samples in another order. Only
    what has the same sizes goes together, so that nothing is padded; a batch is smaller where there are no more such
    samples."""

    def __init__(self, samples: Sequence[Sample], size: int, seed: int = 0) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        alike: dict[tuple, list[int]] = {}
        for at, sample in enumerate(samples):
            alike.setdefault(tuple(tuple(each.shape) for each in sample), []).append(at)
        self._alike = list(alike.values())
        self.in_epoch = sum(-(-len(group) // size) for group in self._alike)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> list[int]:
        """The numbers of the samples of the batch of a step, from 0."""
        epoch, place = divmod(step, self.in_epoch)
        if self._epoch[0] != epoch:
            draw = torch.Generator().manual_seed(self.seed + epoch)
            batches = []
            for group in self._alike:
                order = [group[at] for at in torch.randperm(len(group), generator=draw).tolist()]
                batches += [order[at : at + self.size] for at in range(0, len(order), self.size)]
            self._epoch = epoch, [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]
        return self._epoch[1][place]


def is_batched(program: Program, sample: Sample) -> list[bool]:
    """Of each input, whether its first dimension is that of the batch: one that varies, and is as long as the first input's."""
    values = [node.meta["val"] for node in program.placeholders]
    varies = [value.ndim > 0 and not isinstance(value.shape[0], int) for value in values]
    return [varies[0] and each and given.shape[0] == sample[0].shape[0] for each, given in zip(varies, sample, strict=True)]


def stacked(program: Program, samples: Sequence[Sample]) -> list[list[Tensor]]:
    """Samples of equal sizes as the fewest calls of `program`: one where its batch varies and what has no batch dimension is
    the same in all of them, else one for each sample."""
    if len(samples) == 1:
        return [list(samples[0])]
    batched = is_batched(program, samples[0])
    columns = list(zip(*samples, strict=True))
    same = all(is_one or all(torch.equal(column[0], each) for each in column[1:]) for is_one, column in zip(batched, columns))
    if not any(batched) or not same:
        return [list(each) for each in samples]
    return [[torch.cat(column) if is_one else column[0] for is_one, column in zip(batched, columns)]]
