"""A student beside its teacher: the loss of one on what the other gives for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fxc.ir.program import Program
from fxc.train.batches import Batches, stacked
from fxc.train.loop import Precision, autocast, mean
from fxc.train.losses import Loss, Seen
from fxc.train.trainable import Trainable


class Taught:
    """student: what is trained; teacher: a program, None where the loss needs none; as_teacher, as_student: inputs of the
    student as the teacher takes them, and outputs of the teacher as the student gives them; labels: of each sample, where there
    are any."""

    def __init__(
        self,
        student: Trainable,
        teacher: Program | None,
        loss: Loss,
        *,
        as_teacher: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
        as_student: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
        precision: Precision = "float32",
        seed: int = 0,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.student, self.loss, self.precision = student, loss, precision
        self.teacher = teacher.module() if teacher is not None and loss.needs_teacher else None
        self.as_teacher, self.as_student = as_teacher, as_student
        self.seed, self.penalty = seed, penalty

    def lost(self, inputs: Sequence[Tensor]) -> Tensor:
        """The loss of one call."""
        aims = None
        if self.teacher is not None:
            with torch.no_grad(), autocast(self.precision):
                aims = self._seen(inputs, self.as_student(self.teacher(*self.as_teacher(inputs))))
        with autocast(self.precision):
            given = self.student(*inputs)
        return self.loss(self._seen(inputs, given), aims)

    def steps(self, batches: Batches) -> Callable[[int], Iterator[Tensor]]:
        """What `loop.train` takes: the parts of the loss of a step."""

        def lost(step: int) -> Iterator[Tensor]:
            chosen = [batches.samples[at] for at in batches.at(step)]
            calls = stacked(self.student.program, chosen)
            # What is left out at random in a step does not depend on the steps before it.
            torch.manual_seed(self.seed + step)
            self.student.train()
            for inputs in calls:
                yield self.lost(inputs) / len(calls)
            if self.penalty is not None:
                yield self.penalty()

        return lost

    def judged(self, samples: Sequence[Sequence[Tensor]]) -> Callable[[], float]:
        """The mean loss on `samples`, one by one."""

        @torch.no_grad()
        def judge() -> float:
            self.student.eval()
            return mean([float(self.lost(sample)) for sample in samples])

        return judge

    def _seen(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Seen:
        signature = self.student.program.signature
        names = [each.name for each in signature.inputs]
        return Seen(dict(zip(names, inputs, strict=True)), dict(zip(signature.outputs, outputs, strict=True)))
