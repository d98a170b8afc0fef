"""What the two ways of training share: who is taught, on what, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxc.calibrate.journal import Journal
from fxc.data.labels import Samples
from fxc.passes.base import Context, Original, Result
from fxc.train.taught import Taught
from fxc.train.trainable import Trainable

if TYPE_CHECKING:
    from fxc.passes.recover.recover import Recover


@dataclass
class Lesson:
    """options: the pass; held_out: samples that judge; key: all that the result depends on, where it is saved by."""

    options: Recover
    original: Original
    student: Trainable
    taught: Taught
    training: Samples
    held_out: Samples
    context: Context
    key: dict[str, Any]
    result: Result = field(default_factory=Result)

    def journal(self, part: str) -> Journal | None:
        """Where a part of the training is saved, if it is."""
        return self.context.saves.journal(self.key | {"part": part}) if self.context.saves else None

    def keep(self, note: str, better: bool) -> None:
        """Report a part that has ended."""
        self.result.notes.append(note)
        self.result.changed += len(self.student.latents) if better else 0


@torch.no_grad()
def put(student: Trainable, values: Sequence[Tensor]) -> None:
    """Let the parameters be these."""
    for each, value in zip(student.parameters(), values, strict=True):
        each.copy_(value)


def said(before: float, after: float, better: bool | None = None) -> str:
    better = after < before if better is None else better
    return f"{before:.4g} -> {after:.4g}" if better else f"{before:.4g}, and never better: nothing was changed"
