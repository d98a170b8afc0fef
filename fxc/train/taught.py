"""A student beside its teacher: the loss of one on what the other gives for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.train.batches import Batches, stacked
from fxc.train.features import Projection, pairs, projection
from fxc.train.kept import Kept
from fxc.train.loop import Precision, autocast, mean
from fxc.train.losses import Loss, Seen
from fxc.train.trainable import Trainable

# A projection between widths begins with the least squares of so many samples.
FITTED = 16


class Taught:
    """student: what is trained; teacher: a program, None where the loss needs none; as_teacher, as_student: inputs of the
    student as the teacher takes them, and outputs of the teacher as the student gives them, None for what is not compared;
    in_order: blocks are compared by their order and not by names, for a student that is no part of the teacher. Where the loss
    needs the teacher's likeliest classes alone, they are kept for samples that come again."""

    def __init__(
        self,
        student: Trainable,
        teacher: Program | None,
        loss: Loss,
        *,
        as_teacher: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
        as_student: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] = list,
        precision: Precision = "float32",
        seed: int = 0,
        penalty: Callable[[], Tensor] | None = None,
        in_order: bool = False,
    ) -> None:
        self.student, self.loss, self.precision = student, loss, precision
        needed = teacher if loss.needs_teacher else None
        self.teacher = needed.module() if needed is not None else None
        self.as_teacher, self.as_student = as_teacher, as_student
        self.seed, self.penalty = seed, penalty
        self.run: Callable[..., tuple[Tensor, ...]] = student
        self._projections: list[nn.Module] = []
        if needed is not None and loss.needs_features:
            found = pairs(student.program, needed, in_order)
            self.run = student.also([mine for mine, _ in found])
            _give(self.teacher, needed, [theirs for _, theirs in found])
            self._projections = [projection(*pair) for pair in found]
        self.kept = Kept(loss.k, loss.temperature) if needed is not None and loss.needs_only_tops else None

    @torch.no_grad()
    def projections(self, samples: Sequence[Sequence[Tensor]]) -> dict[str, nn.Parameter]:
        """What is trained besides the student, by name: maps of its features to the teacher's width, where they differ; they
        begin with the least squares of some of these samples."""
        found = {at: each for at, each in enumerate(self._projections) if isinstance(each, Projection)}
        if not found:
            return {}
        seen = [(self._student(inputs)[1], self._aims(inputs).features) for inputs in samples[:FITTED]]
        for at, each in found.items():
            each.fit([(mine[at], theirs[at]) for mine, theirs in seen])
        return {f"projection.{at}": each.weight for at, each in found.items()}

    def lost(
        self, inputs: Sequence[Tensor], labels: Tensor | None = None, names: Sequence[Hashable] | None = None
    ) -> Tensor:
        """The loss of one call. names: of the samples that it is of, if they are to come again."""
        aims = self._aims(inputs, names)
        outputs, features = self._student(inputs)
        features = [project(each) for project, each in zip(self._projections, features, strict=True)]
        return self.loss(self._seen(inputs, outputs, features=features, labels=labels), aims)

    def steps(self, batches: Batches, labels: Sequence[Tensor] | None = None) -> Callable[[int], Iterator[Tensor]]:
        """What `loop.train` takes: the parts of the loss of a step. labels: of each sample, int64 [B] or [B, N]."""

        def lost(step: int) -> Iterator[Tensor]:
            places = batches.at(step)
            calls = stacked(self.student.program, [batches.samples[at] for at in places])
            # What is left out at random in a step does not depend on the steps before it.
            torch.manual_seed(self.seed + step)
            self.student.train()
            of_calls = [places] if len(calls) == 1 else [[at] for at in places]
            for inputs, of_call in zip(calls, of_calls, strict=True):
                known = None if labels is None else torch.cat([labels[at] for at in of_call])
                yield self.lost(inputs, known, of_call) / len(calls)
            if self.penalty is not None:
                yield self.penalty()

        return lost

    def judged(self, samples: Sequence[Sequence[Tensor]], labels: Sequence[Tensor] | None = None) -> Callable[[], float]:
        """The mean loss on `samples`, one by one."""

        @torch.no_grad()
        def judge() -> float:
            self.student.eval()
            known = labels or [None] * len(samples)
            each = enumerate(zip(samples, known, strict=True))
            return mean([float(self.lost(sample, label, [(id(samples), at)])) for at, (sample, label) in each])

        return judge

    def _student(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with autocast(self.precision):
            return self._split(self.run(*inputs), len(self.student.program.signature.outputs))

    def _aims(self, inputs: Sequence[Tensor], names: Sequence[Hashable] | None = None) -> Seen | None:
        """What the teacher gives for the same inputs."""
        if self.teacher is None:
            return None
        if self.kept is not None and names is not None and (tops := self.kept.of(names)):
            return self._seen(inputs, (), tops=tops)
        with torch.no_grad(), autocast(self.precision):
            given = self.teacher(*self.as_teacher(inputs))
        outputs, features = self._split(given, len(given) - len(self._projections))
        aims = self._seen(inputs, self.as_student(outputs), features=features)
        if self.kept is not None and names is not None:
            self.kept.add(names, aims.outputs)
        return aims

    def _split(self, given: Sequence[Tensor], outputs: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return given[:outputs], given[outputs:]

    def _seen(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], **more: object) -> Seen:
        signature = self.student.program.signature
        names = [each.name for each in signature.inputs]
        named = zip(signature.outputs, outputs, strict=True) if outputs else ()
        given = {name: each for name, each in named if each is not None}
        return Seen(dict(zip(names, inputs, strict=True)), given, causal=is_causal_lm(self.student.program), **more)


def _give(module: fx.GraphModule, program: Program, nodes: Sequence[fx.Node]) -> None:
    """Let the module of a program give the values of these nodes too, after its outputs."""
    copies = dict(zip(program.graph.nodes, module.graph.nodes, strict=True))
    end = module.graph.output_node()
    end.args = ((*end.args[0], *(copies[node] for node in nodes)),)
    module.recompile()
