"""One half of a block after the other is trained to give what the teacher's gave (BRECQ, Li et al., arXiv 2102.05426;
EfficientQAT, Chen et al., arXiv 2407.11062; "A Free Lunch in LLM Compression", arXiv 2510.14444).

Hidden states of the student and of its teacher flow side by side. A segment is given what the student's earlier segments, which
are trained already, give now; its aim is what the teacher's gave. The layer that it ends with is solved for first
(`last_linear`). No gradient goes further than the segment, whose values are all that is in memory besides the hidden states.
What comes last, and gives no hidden state, is not trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from fxc import ranks
from fxc.calibrate.needs import Needs, nbytes_of, symbols_of
from fxc.calibrate.reconstruct import Fit, reconstruct
from fxc.calibrate.stream import Passage, Stream, alive_before
from fxc.ir.program import Program
from fxc.progress import Track, untracked
from fxc.train.last_linear import Ends, ends_of, solve
from fxc.train.plain import Plain
from fxc.train.segments import Segment, segments
from fxc.train.trainable import Trainable

Sample = Sequence[Tensor]
# Of the energy of what a segment gives: where no more is lost, nothing is to be trained.
NOTHING = 1e-9
# Samples in a step: at equal cost, many small steps end lower than few large ones.
BATCH = 2
# Of each weight that is trained: as it is, its latent, two moments, a gradient of both, and as it was best.
TRAINING = 7


@dataclass
class Halves:
    """What became of the segments. fits: of those that were trained, by their first layer; unlike: where student and teacher
    cannot be compared, in words; late: those whose turn came after the time was over; solved: after that of their training, so
    that nothing but their last layer was solved for."""

    fits: dict[str, Fit] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)
    late: int = 0
    solved: int = 0

    def __str__(self) -> str:
        late = [f"the last {self.late} were not begun, their time was over"] if self.late else []
        if self.solved:
            late.insert(0, f"the last layer of {self.solved} was solved for and no more, the time of their training was over")
        if not self.fits:
            return "; ".join([*late, *self.unlike]) or "there is nothing that blocks have lost"
        shares = [(sum(each) / len(self.fits)) ** 0.5 for each in zip(*((fit.before, fit.after) for fit in self.fits.values()))]
        better = sum(fit.after < fit.before for fit in self.fits.values())
        errors = f"their errors on held-out samples {shares[0]:.2%} -> {shares[1]:.2%}"
        return "; ".join([f"{better} of {len(self.fits)} half-blocks better, {errors}", *late, *self.unlike])


@torch.no_grad()
def recover_halves(
    student: Trainable,
    teacher: Program,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    as_teacher: Callable[[Sample], Sample] = list,
    steps: int = 200,
    batch: int = BATCH,
    rate: float = 0.02,
    seed: int = 0,
    seconds: float = 0.0,
    training_seconds: float = 0.0,
    within: Callable[[], AbstractContextManager] = nullcontext,
    track: Track = untracked,
) -> Halves:
    """Train what `student` lets be trained, in place, segment by segment; teacher: a canonical program.

    steps: for each segment, 0: nothing but its last layer is changed; rate: the largest step of a number, as a share of the
    mean size of those of its weight; seconds: if given, no segment is begun after so many; training_seconds: if given, after
    so many no steps are made. Raises ResourceError, before it begins, where there is not enough memory.
    """
    plain = Plain(student)
    every = [*samples, *held_out]
    mine, theirs = Stream(plain.program, every), Stream(teacher, [as_teacher(each) for each in every])
    found, unlike = segments(plain.program, student.layers, teacher, every[0], as_teacher(every[0]))
    made = Halves(unlike=unlike)
    if len(found) < 2:
        return made
    _needs(plain.program, found, mine, theirs, batch).check("recover:method=blocks")
    began = time.monotonic()
    for number, (segment, after) in enumerate(pairwise(found), 1):
        spent = ranks.agreed(time.monotonic() - began)
        if seconds and spent > seconds:
            made.late = len(found) - number
            break
        is_late = bool(training_seconds) and spent > training_seconds
        passage = _passage(plain.program, segment, mine, theirs)
        own = [name for name in plain.gives if name in passage.own]
        ends = ends_of(segment.gives[0], segment.aims[0], set(segment.mine), own)
        aims = _aims(ends, theirs, len(samples)) if ends is not None else []
        theirs.flow(after.theirs[0])
        parameters = {name: [p for p in student.latents[name].parameters() if p.requires_grad] for name in own}
        if any(parameters.values()):
            what = f"recovering {segment.layers[0]} ({number} of {len(found) - 1})"
            fit = reconstruct(
                passage, {name: plain.gives[name] for name in own if parameters[name]}, _optimizer(student, own, rate),
                first=_solver(ends, plain, mine, aims), schedule=cosine, steps=0 if is_late else steps, batch=batch, seed=seed,
                held_out=range(len(samples), len(every)), within=within, least=NOTHING, track=track, what=what,
            )  # fmt: skip
            if fit.before > NOTHING:
                made.fits[segment.layers[0]] = fit
                made.solved += is_late and ends is not None
                plain.update(own)
        mine.flow(after.mine[0], theirs)
    return made


def _aims(ends: Ends, theirs: Stream, count: int) -> list[Tensor]:
    """What sums are to be, of the first `count` samples, where `theirs` is given the segment's inputs."""
    read = theirs.reader([ends.aim])
    return [read(state)[ends.aim] for state in theirs.states[:count]]


def _solver(ends: Ends | None, plain: Plain, mine: Stream, aims: list[Tensor]) -> Callable[[], None] | None:
    return None if ends is None else lambda: solve(ends, plain, mine.states[: len(aims)], aims)


def cosine(done: float) -> float:
    """Up in a twentieth of the steps, and down again."""
    return min(1.0, 0.1 + done * 20) * (0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * done))))


def _needs(program: Program, found: list[Segment], mine: Stream, theirs: Stream, batch: int) -> Needs:
    """Hidden states of both where they are largest, and, for the segment where that is most, its weights in training and what
    the largest samples give in it, with gradients."""
    places = [0] * len(found[1:])
    for stream, begins in ((mine, [each.mine[0] for each in found[1:]]), (theirs, [each.theirs[0] for each in found[1:]])):
        known = [symbols_of(stream.program, [*state.values()]) for state in stream.states]
        for at, begin in enumerate(begins):
            values = [n.meta["val"] for n in alive_before(stream.program, begin) if n.op != "placeholder"]
            places[at] += sum(nbytes_of(value, symbols) for symbols in known for value in values)
    symbols = symbols_of(program, max(([*state.values()] for state in mine.states), key=lambda s: sum(t.numel() for t in s)))
    training = []
    for segment in found[:-1]:
        read = {each.target for node in segment.mine for each in node.all_input_nodes if each.op == "get_attr"}
        values = sum(nbytes_of(node.meta.get("val"), symbols) for node in segment.mine)
        training.append(TRAINING * 4 * sum(program.constants[name].numel() for name in read) + 2 * batch * values)
    return Needs(max(places), 0, 0, 0, [], training=max(training))


def _passage(program: Program, segment: Segment, mine: Stream, theirs: Stream) -> Passage:
    first = program.placeholders[0].meta["val"]
    batch = first.shape[0].node.expr if first.ndim and not isinstance(first.shape[0], int) else None
    aim = segment.aims[0]
    return Passage(
        program, segment.mine, len(mine.states), segment.gives, lambda at: mine.states[at],
        lambda at: [theirs.states[at][aim]], batch,
    )  # fmt: skip


def _optimizer(student: Trainable, own: list[str], rate: float) -> torch.optim.Optimizer:
    """AdamW with a rate for each weight: steps of one size would be none for a large weight, and ruin a small one. Factors of
    scales are around 1. A bias goes by the weights of its segment, for it may be zero."""
    named: list[tuple[str, nn.Parameter]] = []
    for latent in (student.latents[name] for name in own):
        named += [(latent.kind[name], each) for name, each in latent.named_parameters() if each.requires_grad]
    sizes = {kind: [_size(each) for k, each in named if k == kind] for kind in ("weight", "vector")}
    typical = sum(sizes["weight"]) / max(len(sizes["weight"]), 1)
    groups = []
    for kind, each in named:
        size = 0.1 if kind == "scale" else max(_size(each), typical) if kind == "vector" else _size(each)
        groups.append({"params": [each], "lr": rate * size})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _size(tensor: Tensor) -> float:
    """The mean size of the numbers that are not zero."""
    sizes = tensor.detach().abs()
    return float(sizes.sum() / (sizes > 0).sum().clamp(min=1))
