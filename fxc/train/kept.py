"""A teacher's likeliest classes for samples that come again, so that it does not run for these."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from fxc.train.losses import Top, classes_last, logits_of, top_of

# What does not fit is computed again each time.
MOST_BYTES = 2 << 30


class Kept:
    """Of samples by name, and of each output of logits, its `Top` at one k and temperature. bytes: how much is kept."""

    def __init__(self, k: int, temperature: float, most: int = MOST_BYTES) -> None:
        self.k, self.temperature, self.most, self.bytes = k, temperature, most, 0
        self._tops: dict[Hashable, dict[str, Top]] = {}

    def of(self, names: Sequence[Hashable]) -> dict[str, Top]:
        """Of a batch of samples, {} where one is not there."""
        if not all(name in self._tops for name in names):
            return {}
        kept = [self._tops[name] for name in names]
        return {
            output: Top(*(torch.cat(parts) for parts in zip(*(_parts(each[output]) for each in kept), strict=True)))
            for output in kept[0]
        }

    def add(self, names: Sequence[Hashable], outputs: Mapping[str, Tensor]) -> None:
        """Of a batch of samples, all with the same number of rows; nothing where k is all classes, or memory is full."""
        tops = {}
        for output, logits in logits_of(outputs, "topk").items():
            logits = classes_last(logits)
            if logits.shape[-1] <= self.k or logits.shape[0] % len(names):
                return
            tops[output] = _parts(top_of(logits, self.k, self.temperature))
        size = sum(part.numel() * part.element_size() for parts in tops.values() for part in parts)
        if self.bytes + size > self.most:
            return
        for at, name in enumerate(names):
            if name not in self._tops:
                rows = {output: [part.chunk(len(names))[at].clone() for part in parts] for output, parts in tops.items()}
                self._tops[name] = {output: Top(*parts) for output, parts in rows.items()}
                self.bytes += size // len(names)


def _parts(top: Top) -> tuple[Tensor, Tensor, Tensor]:
    return top.classes, top.logs, top.rest
