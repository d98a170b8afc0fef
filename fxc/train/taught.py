"""A student beside its teacher: the loss of one on what the other gives for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fxc import ranks
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.train.attention import faster
from fxc.train.batches import Batches, stacked
from fxc.train.features import Projection, is_alike, pairs, projection
from fxc.train.kept import Kept
from fxc.train.loop import Pieces
from fxc.train.losses import Loss, Seen, classes_last, floats_of, logits_of, top_of
from fxc.train.precision import Precision, autocast
from fxc.train.trainable import Trainable

# A projection between widths begins with the least squares of so many samples.
FITTED = 16


class Taught:
    """student: what is trained; teacher: a program, None where the loss needs none; as_teacher, as_student: inputs of the
    student as the teacher takes them, and outputs of the teacher as the student gives them, None for what is not compared;
    in_order: blocks are compared by their order and not by names, for a student that is no part of the teacher. What the
    teacher gives is kept for samples that come again, if there is room for all of them: where the loss needs the likeliest
    classes alone, these."""

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
        self.teacher = faster(needed.module()) if needed is not None else None
        self.as_teacher, self.as_student = as_teacher, as_student
        self.seed, self.penalty = seed, penalty
        self.run: Callable[..., tuple[Tensor, ...]] = student
        self._projections: list[nn.Module] = []
        found: list[tuple[fx.Node, fx.Node]] = []
        if needed is not None and loss.needs_features:
            found = pairs(student.program, needed, in_order)
            self.run = student.also([mine for mine, _ in found])
            _give(self.teacher, needed, [theirs for _, theirs in found])
            self._projections = [projection(*pair) for pair in found]
        given = [*needed.results, *(theirs for _, theirs in found)] if needed is not None else []
        self.kept = Kept() if needed is not None and _goes_by_sample(needed, given) else None
        # Of all samples that will come again.
        self._numbers = 0
        # Whether each process has parts of weights alone (`fxc.train.shards`).
        self.gathers = False

    @torch.no_grad()
    def projections(self, samples: Sequence[Sequence[Tensor]]) -> dict[str, nn.Parameter]:
        """What is trained besides the student, by name: maps of its features to the teacher's, where their widths differ or
        they are nothing alike, as in a stream that was turned. They begin with the least squares of some of these samples."""
        if not self._projections:
            return {}
        seen = [(self._student(inputs)[1], self._aims(inputs).features) for inputs in samples[:FITTED]]
        maps = {}
        for at, each in enumerate(self._projections):
            pairs = [(mine[at], theirs[at]) for mine, theirs in seen]
            if not isinstance(each, Projection):
                if is_alike(pairs):
                    continue
                each = self._projections[at] = Projection.of_same(pairs[0][0])
            each.fit(pairs)
            maps[f"projection.{at}"] = each.weight
        return maps

    def lost(
        self, inputs: Sequence[Tensor], labels: Tensor | None = None, names: Sequence[Hashable] | None = None
    ) -> Tensor:
        """The loss of one call. names: of the samples that it is of, if they are to come again."""
        aims = self._aims(inputs, names)
        outputs, features = self._student(inputs)
        features = [project(each) for project, each in zip(self._projections, features, strict=True)]
        return self.loss(self._seen(inputs, outputs, features=features, labels=labels), aims)

    def pieces(
        self,
        batches: Batches,
        held_out: Sequence[Sequence[Tensor]],
        labels: Sequence[Tensor] | None = None,
        held_out_labels: Sequence[Tensor] | None = None,
        *,
        accumulate: int = 1,
    ) -> Pieces:
        """What `loop.train` learns from, and is judged by; labels: as `steps` takes them. accumulate: in so many parts the loss
        of a batch is computed."""
        names = [each.name for each in self.student.program.signature.inputs]
        tokens = names.index("input_ids") if "input_ids" in names else None

        def counted(step: int) -> int:
            chosen = [batches.samples[at] for at in batches.at(step)]
            return len(chosen) if tokens is None else sum(sample[tokens].numel() for sample in chosen)

        lost, judged = self.steps(batches, labels, accumulate=accumulate), self.judged(held_out, held_out_labels)
        return Pieces(lost, judged, counted, "samples" if tokens is None else "tokens")

    def steps(
        self, batches: Batches, labels: Sequence[Tensor] | None = None, *, accumulate: int = 1
    ) -> Callable[[int], Iterator[Tensor]]:
        """The loss of a batch by its number, in the parts of it that are this process's: each counts by its samples. labels: of
        each sample, int64 [B] or [B, N]. Of samples without padding the parts of all but outputs, which is a share of each
        part's energy, add up to the loss of the whole batch."""

        self._numbers += sum(map(_numbers, batches.samples))

        def lost(step: int) -> Iterator[Tensor]:
            places = batches.at(step)
            # What is left out at random in a step does not depend on the steps before it.
            torch.manual_seed(self.seed + step)
            self.student.train()
            calls = list(self._calls(batches.samples, ranks.share(places), accumulate))
            more = self._more(len(calls)) * [(batches.samples[places[0]], [places[0]])]
            for number, (inputs, of_call) in enumerate(calls + more):
                known = None if labels is None else torch.cat([labels[at] for at in of_call])
                yield self.lost(inputs, known, of_call) * (len(of_call) / len(places) if number < len(calls) else 0)
            if self.penalty is not None:
                yield self.penalty() / ranks.count()

        return lost

    def judged(self, samples: Sequence[Sequence[Tensor]], labels: Sequence[Tensor] | None = None) -> Callable[[], float]:
        """The mean loss on `samples`, one by one, each process those that are its own."""
        known = labels or [None] * len(samples)
        self._numbers += sum(map(_numbers, samples))

        @torch.no_grad()
        def judge() -> float:
            self.student.eval()
            own = [*ranks.share(range(len(samples)))]
            lost = [float(self.lost(samples[at], known[at], [(id(samples), at)])) for at in own + self._more(len(own)) * [0]]
            return ranks.added(sum(lost[: len(own)])) / len(samples)

        return judge

    def _calls(
        self, samples: Sequence[Sequence[Tensor]], places: Sequence[int], accumulate: int
    ) -> Iterator[tuple[Sequence[Tensor], Sequence[int]]]:
        """Inputs, and of which samples they are, so many parts one after another."""
        size = max(-(-len(places) // accumulate), 1)
        for begin in range(0, len(places), size):
            part = places[begin : begin + size]
            calls = stacked(self.student.program, [samples[at] for at in part])
            yield from zip(calls, [part] if len(calls) == 1 else [[at] for at in part], strict=True)

    def _more(self, calls: int) -> int:
        """How many calls more, of no account, another process makes, which gathers weights with this one for each."""
        return int(ranks.largest(torch.tensor(calls))) - calls if self.gathers else 0

    def _student(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with autocast(self.precision):
            return self._split(self.run(*inputs), len(self.student.program.signature.outputs))

    def _aims(self, inputs: Sequence[Tensor], names: Sequence[Hashable] | None = None) -> Seen | None:
        """What the teacher gives for the same inputs."""
        if self.teacher is None:
            return None
        if self.kept is not None and names is not None and (known := self.kept.of(names)) is not None:
            return replace(self._seen(inputs, ()), **known)
        with torch.no_grad(), autocast(self.precision):
            given = self.teacher(*self.as_teacher(inputs))
        outputs, features = self._split(given, len(given) - len(self._projections))
        aims = self._seen(inputs, self.as_student(outputs), features=features)
        if self.kept is not None and names is not None:
            self.kept.add(names, self._needed(aims), _numbers(inputs) / max(self._numbers, 1))
        return aims

    def _needed(self, aims: Seen) -> dict[str, object]:
        """What the loss reads of these."""
        loss = self.loss
        if loss.needs_only_tops:
            logits = {name: classes_last(each) for name, each in logits_of(aims.outputs, "topk").items()}
            if all(each.shape[-1] > loss.k for each in logits.values()):
                return {"tops": {name: top_of(each, loss.k, loss.temperature) for name, each in logits.items()}}
        return {"outputs": floats_of(aims.outputs), "features": list(aims.features)}

    def _split(self, given: Sequence[Tensor], outputs: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return given[:outputs], given[outputs:]

    def _seen(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], **more: object) -> Seen:
        signature = self.student.program.signature
        names = [each.name for each in signature.inputs]
        named = zip(signature.outputs, outputs, strict=True) if outputs else ()
        given = {name: each for name, each in named if each is not None}
        return Seen(dict(zip(names, inputs, strict=True)), given, causal=is_causal_lm(self.student.program), **more)


def _numbers(inputs: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in inputs)


def _goes_by_sample(program: Program, given: Sequence[fx.Node]) -> bool:
    """Whether the first dimension of these values is that of samples, where several are computed together."""
    first = program.placeholders[0].meta["val"]
    if not first.ndim or isinstance(first.shape[0], int):
        return True
    values = [node.meta["val"] for node in given]
    return all(each.ndim and str(each.shape[0]) == str(first.shape[0]) for each in values if each.is_floating_point())


def _give(module: fx.GraphModule, program: Program, nodes: Sequence[fx.Node]) -> None:
    """Let the module of a program give the values of these nodes too, after its outputs."""
    copies = dict(zip(program.graph.nodes, module.graph.nodes, strict=True))
    end = module.graph.output_node()
    end.args = ((*end.args[0], *(copies[node] for node in nodes)),)
    module.recompile()
