"""Which part of a student stands for which part of its teacher: both are cut into blocks, and ends are compared.

Two ends are the same place if the same layers lie before them, of those that the student has: layers may be thinner, and some
may be gone. Of several such ends of the teacher the last one counts, so that what is left makes up for a layer that is gone.
What is alive there is the residual stream, whose width passes keep; where it has another one, or is turned, these are no ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.calibrate.blocks import Block, blocks
from fxc.calibrate.stream import reader
from fxc.ir.cache import is_present
from fxc.ir.names import layer_at
from fxc.ir.program import Program


@dataclass(frozen=True)
class Segment:
    """mine, theirs: the nodes of the student and of the teacher, in order; gives, aims: at its end, of both; inner: whether
    that is an end of blocks, and not of the programs; layers: of the student."""

    mine: list[fx.Node]
    theirs: list[fx.Node]
    gives: list[fx.Node]
    aims: list[fx.Node]
    inner: bool
    layers: list[str]


def segments(
    student: Program, names: Mapping[str, str], teacher: Program, sample: Sequence[Tensor], as_teacher: Sequence[Tensor]
) -> tuple[list[Segment], list[str]]:
    """The segments in order, and in words which ends cannot be compared. names: constant of the student -> the layer that it is
    of; sample, as_teacher: inputs of both, which tell whether ends are comparable: of the same shape, and nearer to each other
    than to zero. The last segment gives what the programs give, without a cache."""
    mine, theirs = blocks(student), blocks(teacher)
    if not mine or not theirs:
        return [], ["there are no layers to compare"]
    known, others = _before(student, mine, names), _before(teacher, theirs, {})
    left, pairs = set(known[-1]), []
    for at, layers in enumerate(known[:-1]):
        there = [n for n, each in enumerate(others[:-1]) if Counter({k: v for k, v in each.items() if k in left}) == layers]
        pairs += [(at, there[-1])] if there else []
    ends = [mine[at].leaves for at, _ in pairs], [theirs[there].leaves for _, there in pairs]
    apart = _apart((student, ends[0], sample), (teacher, ends[1], as_teacher))
    lost = len(mine) - 1 - len(pairs)
    found, unlike, begin = [], [f"{lost} blocks end where the model has no end"] if lost else [], (0, 0)
    for (at, there), gap in zip(pairs, apart, strict=True):
        if gap is None or not gap < 1:
            said = "has another shape" if gap is None else "is nothing like what it was"
            unlike.append(f"what {_layers(student, mine[at : at + 1], names)[-1]} leaves {said}")
            continue
        found.append(_segment(student, names, mine[begin[0] : at + 1], theirs[begin[1] : there + 1]))
        begin = at + 1, there + 1
    results = _results(student, teacher, mine[begin[0] :], theirs[begin[1] :])
    return [*found, _segment(student, names, mine[begin[0] :], theirs[begin[1] :], results)], unlike


def _before(program: Program, some: list[Block], names: Mapping[str, str]) -> list[Counter[str]]:
    """Of each end, how often each layer was computed by then."""
    counts, now = [], Counter()
    for block in some:
        now = now + Counter(_layers(program, [block], names))
        counts.append(now)
    return counts


def _layers(program: Program, some: list[Block], names: Mapping[str, str]) -> list[str]:
    made = []
    for block in some:
        for layer in (each for group in block.groups for each in group):
            read = [each.target for each in layer.all_input_nodes if each.op == "get_attr" and each.target in names]
            made.append(names[read[0]] if read else layer_at(program, layer))
    return made


def _apart(*both: tuple[Program, list[fx.Node], Sequence[Tensor]]) -> list[float | None]:
    """Of each two ends, of a student and of a teacher with such inputs, their squared difference as a share of the teacher's
    energy; None for other shapes."""
    with torch.no_grad():
        given, aims = (
            list(reader(program, ends, program.placeholders)(dict(zip(program.placeholders, inputs, strict=True))).values())
            for program, ends, inputs in both
        )
        gaps: list[float | None] = []
        for one, other in zip(given, aims, strict=True):
            if one.shape != other.shape or not one.is_floating_point():
                gaps.append(None)
            else:
                energy = float(other.float().square().sum())
                gaps.append(float((one.float() - other.float()).square().sum()) / max(energy, 1e-30))
    return gaps


def _results(student: Program, teacher: Program, mine: list[Block], theirs: list[Block]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What both programs give that the blocks compute, and is no cache."""
    inside = [{node for block in some for node in block.nodes} for some in (mine, theirs)]
    ends = [dict(zip(program.signature.outputs, program.results, strict=True)) for program in (student, teacher)]
    names = [
        name for name, node in ends[0].items()
        if not is_present(name) and node in inside[0] and ends[1].get(name) in inside[1]
        and node.meta["val"].is_floating_point()
    ]  # fmt: skip
    return [ends[0][name] for name in names], [ends[1][name] for name in names]


def _segment(
    student: Program, names: Mapping[str, str], mine: list[Block], theirs: list[Block],
    results: tuple[list[fx.Node], list[fx.Node]] | None = None,
) -> Segment:  # fmt: skip
    gives, aims = results or ([mine[-1].leaves], [theirs[-1].leaves])
    nodes = [[node for block in some for node in block.nodes] for some in (mine, theirs)]
    return Segment(*nodes, gives, aims, results is None, _layers(student, mine, names))
