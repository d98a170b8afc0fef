"""How much may go: the most units whose loss of quality stays within a budget, by bisection over a ranking of all of them.

Units are ranked on one half of the data and judged on the other, by masking what they say and not by removing them.

ranking samples --scores--> units, the least missed first --bisection over how many, on the judging samples--> what goes
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxc.analysis.groups import NAMES, Group
from fxc.data.samples import drawn
from fxc.errors import UsageError, first_line
from fxc.ir.cache import is_causal_lm, is_present
from fxc.ir.next_token import next_token_loss
from fxc.ir.program import Program
from fxc.passes.base import Context
from fxc.passes.prune.scores import by_unit, scores, with_masks
from fxc.progress import Track, untracked

Units = dict[Group, Tensor]

_GRAIN = 256
"""The amount is found to one part in so many."""


@dataclass
class Choice:
    """units: what goes of each group, [n] int64; unscored: the groups that the criterion says nothing about; notes: what was
    chosen and how it was judged, for people."""

    units: Units = field(default_factory=dict)
    unscored: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(
    program: Program,
    candidates: Sequence[Group],
    context: Context,
    budget: float,
    criterion: str,
    amounts: Callable[[Mapping[Group, Tensor], list[tuple[Group, int]]], tuple[int, Callable[[int], Units]]],
) -> Choice:
    """The units of `candidates` to mask. budget: what it may cost, see `Judge`; amounts: from the scores of each group and
    the ranking to how many steps there are and what goes at each, more at every step and at step 0 nothing.

    Data is `context.samples`, and where there is none inputs made for the program, which is said.
    """
    if not candidates:
        return Choice(notes=["amount=auto: nothing can go: the model has nothing that can be pruned"])
    if not judged_outputs(program):
        why = "no output has floating-point numbers to judge by; prune:ffn=0.1 says how much instead"
        return Choice(notes=[f"amount=auto: nothing can go: {why}"])
    choice = Choice()
    given = bool(context.samples)
    samples = context.samples or drawn(program, seed=context.seed)
    ranking, judging = halves(program, samples)
    try:
        found = scores(program, candidates, criterion, ranking, context.track, context.seed)
    except RuntimeError as error:  # torch's own where an operator has no gradient
        choice.notes.append(f"ranked by l2, because the model gives no gradients: {first_line(error)}")
        criterion, found = "l2", scores(program, candidates, "l2")
    choice.unscored = [g for g in candidates if g not in found]
    last, units_at = amounts(found, ranked(program, found, by_gradient=criterion == "taylor"))
    by_loss = given and is_causal_lm(program)
    judge = Judge(program, list(found), judging, by_loss=by_loss, limit=context.limit, tried=context.tried)
    costs: dict[int, float] = {}

    def fits(step: int) -> bool:
        costs[step] = judge.cost(units_at(step))
        return costs[step] <= budget

    step = most_within(last, fits, context.track)
    choice.units = units_at(step)
    kind = f"{'held-out ' if judging is not ranking else ''}calibration" if given else "made-up"
    where = f"{len(judging)} {kind} sample{'s' * (len(judging) != 1)}"
    if step:
        said = f"{_counted(choice.units, found)} go; cost: {costs[step]:.2%} of {judge.unit} on {where}, budget {budget:.2%}"
    else:
        least = min(costs, default=0)
        said = f"nothing can go within the budget of {100 * budget:g}%"
        if least:
            said += f": {_counted(units_at(least), found)} would cost {costs[least]:.2%} of {judge.unit} on {where}"
    choice.notes[:0] = [f"amount=auto: {said}", *([_told(costs, last, step)] if costs else [])]
    if not given:
        choice.notes.append("no calibration data was given: real data (--calib, calib=) would rank and judge better")
    return choice


def _told(costs: Mapping[int, float], last: int, kept: int) -> str:
    """What was tried, in that order, and what was kept. costs: by steps, of which there are `last`."""
    each = (f"{step:,}: {cost:.2%}" if math.isfinite(cost) else f"{step:,}: beyond any budget" for step, cost in costs.items())
    end = f"kept {kept:,}, the most that is within it" if kept else "none is within it: nothing is pruned"
    return f"tried, in steps of {last:,} to half of everything, and what each costs: {', '.join(each)}; {end}"


def _counted(units: Units, found: Mapping[Group, Tensor]) -> str:
    """2 of 16 heads, 3 of 96 FFN channels"""
    going, there = Counter(), Counter()
    for group in found:
        there[group.kind] += group.size
        going[group.kind] += len(units.get(group, ()))
    return ", ".join(f"{n:,} of {there[kind]:,} {NAMES[kind]}s" for kind, n in going.items() if n) or "nothing"


def most_within(last: int, fits: Callable[[int], bool], track: Track = untracked) -> int:
    """The largest of 0 .. `last` that `fits`, to one part in 256 of `last`, by bisection; 0 is taken to fit, and nothing
    beyond what does not fit."""
    *_, most = track(_bisection(last, fits), "trying how much can go", last.bit_length() + 1)
    return most


def _bisection(last: int, fits: Callable[[int], bool]) -> Iterator[int]:
    """After each try, the largest number known to fit."""
    if last == 0 or fits(last):
        yield last
        return
    low, high = 0, last
    yield low
    while high - low > (max(1, last // _GRAIN) if low else 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
        yield low


def ranked(program: Program, found: Mapping[Group, Tensor], *, by_gradient: bool) -> list[tuple[Group, int]]:
    """Units, those that are missed least first, and never more than half of a group. found: [size] scores of each group.
    Gradients compare units of all groups, and count for each number that goes with the unit; of other scores only how they
    lie about the mean of their group means something."""
    entries = []
    for number, (group, its) in enumerate(found.items()):
        unit = _numbers_in_a_unit(program, group) if by_gradient else its.mean().item() or 1.0
        order = its.argsort(stable=True)[: group.size // 2].tolist()
        entries += [(its[i].item() / unit, number, rank, group, i) for rank, i in enumerate(order)]
    return [(group, i) for *_, group, i in sorted(entries, key=lambda entry: entry[:3])]


def _numbers_in_a_unit(program: Program, group: Group) -> float:
    total = 0.0
    for member in group.members:
        tensor = program.constants[member.fqn]
        share = tensor.numel() / len(member.units)
        total += by_unit(member.units, torch.full(member.units.shape, share), group.size).sum().item()
    return total / group.size


def halves(program: Program, samples: Sequence[Sequence[Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Every other sample; a single one is cut along its batch, where all of its inputs have one, and else it is both halves."""
    if len(samples) > 1:
        return [list(s) for s in samples[::2]], [list(s) for s in samples[1::2]]
    (only,) = samples
    batches = {t.shape[0] if t.ndim and not isinstance(n.meta["val"].shape[0], int) else 0
               for t, n in zip(only, program.placeholders, strict=True)}  # fmt: skip
    if len(batches) > 1 or batches <= {0, 1}:
        both = [list(only)]
        return both, both
    (batch,) = batches
    return [[t[: batch // 2] for t in only]], [[t[batch // 2 :] for t in only]]


class Judge:
    """Measures what masking some units costs, relative to the program as it is: 0.02 is two in a hundred.

    by_loss: of a causal language model, by how much the loss of the next token rises on the samples, which are texts then.
    Otherwise how far the outputs move. Of the outputs that are logits: KL(before || after) / H(before), by how much the loss
    rises on labels that the model itself would give. Of a model without such outputs the largest over its floating-point
    outputs of |after - before|^2 / |before|^2. Infinite where a number is no longer finite.
    limit, tried: masking may not move an output by more than `limit`, |after - before| / |before|, on the inputs `tried`.
    """

    def __init__(
        self,
        program: Program,
        groups: Sequence[Group],
        samples: Sequence[Sequence[Tensor]],
        *,
        by_loss: bool,
        limit: float | None = None,
        tried: Sequence[Sequence[Tensor]] = (),
    ):
        copy, names = with_masks(program, groups)
        self._module = copy.module()
        # The module reads these very tensors.
        self._masks = {g: copy.constants[name] for g, name in names.items()}
        self._mask_input = next((i for i, d in enumerate(program.signature.inputs) if d.name == "attention_mask"), None)
        self._outputs = judged_outputs(program)
        self._by_loss, self._limit = by_loss, math.inf if limit is None else limit
        self._samples, self._tried = samples, tried if limit is not None else ()
        self.unit = self._unit()
        with torch.no_grad():
            self._before = [self._kept(self._module(*inputs), inputs) for inputs in samples]
            if by_loss and all(inputs[0].shape[1] < 2 for inputs in samples):
                raise UsageError("calibration samples of one token have no next token", where="prune", hint="give longer texts")
            self._before_tried = [self._module(*inputs) for inputs in self._tried]

    def _unit(self) -> str:
        """What the cost is a share of."""
        if self._by_loss:
            return "the loss"
        return "the outputs' squares" if None in self._outputs.values() else "the original's own loss (KL / entropy)"

    def cost(self, units: Units) -> float:
        """Of masking these units of each group, [n] int64, and no others."""
        for group, mask in self._masks.items():
            mask.fill_(1)
            if group in units:
                mask[units[group]] = 0
        sums: dict[int, list[float]] = {}
        with torch.no_grad():
            for inputs, before in zip(self._samples, self._before, strict=True):
                after = self._kept(self._module(*inputs), inputs)
                for index, reference in before.items():
                    moved, whole = self._compare(index, reference, after[index])
                    total = sums.setdefault(index, [0.0, 0.0])
                    total[0] += moved
                    total[1] += whole
            if self._is_beyond_limit():
                return math.inf
        return max(_ratio(*total) for total in sums.values())

    def _kept(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """What is needed of the outputs, by their index."""
        if self._by_loss:
            (index,) = self._outputs
            return {index: self._loss(outputs[index], inputs)}
        return {index: outputs[index] for index in self._outputs}

    def _loss(self, logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The sum of the losses of the next token, [] float64."""
        return next_token_loss(logits, inputs[0], None if self._mask_input is None else inputs[self._mask_input])

    def _compare(self, index: int, before: Tensor, after: Tensor) -> tuple[float, float]:
        """By how much it moved, and the whole that this is a share of."""
        if self._by_loss:
            return (after - before).item(), before.item()
        dim = self._outputs[index]
        return _squares(before, after) if dim is None else _divergence(before, after, dim)

    def _is_beyond_limit(self) -> bool:
        for inputs, before in zip(self._tried, self._before_tried, strict=True):
            for a, b in zip(before, self._module(*inputs), strict=True):
                if a.is_floating_point() and not math.sqrt(_ratio(*_squares(a, b))) <= self._limit:
                    return True
        return False


def judged_outputs(program: Program) -> dict[int, int | None]:
    """The outputs to judge by: index -> the dimension of its classes, where they are logits, else None. Those that are logits
    where there are some, and else all of floating-point numbers that are no cache."""
    logits: dict[int, int | None] = {}
    others: dict[int, int | None] = {}
    for index, (name, node) in enumerate(zip(program.signature.outputs, program.results, strict=True)):
        value = node.meta["val"]
        if not value.is_floating_point() or is_present(name):
            continue
        # Of pictures the classes come second.
        dim = 1 if value.ndim == 4 else -1
        is_distribution = value.ndim > 1 and (name == "logits" or name.endswith("_logits"))
        if is_distribution and not (isinstance(value.shape[dim], int) and value.shape[dim] == 1):
            logits[index] = dim
        else:
            others[index] = None
    return logits or others


def _squares(before: Tensor, after: Tensor) -> tuple[float, float]:
    before, after = before.double(), after.double()
    finite = before.isfinite()
    if not bool((finite == after.isfinite()).all()):
        return math.inf, 1.0
    return (after - before)[finite].square().sum().item(), before[finite].square().sum().item()


def _divergence(before: Tensor, after: Tensor, dim: int) -> tuple[float, float]:
    logs = [t.double().log_softmax(dim) for t in (before, after)]
    p = logs[0].exp()
    there = p > 0
    kl, entropy = p * (logs[0] - logs[1]), -p * logs[0]
    kl, entropy = (torch.where(there, t, 0.0).sum().item() for t in (kl, entropy))
    return (kl, entropy) if math.isfinite(kl) else (math.inf, 1.0)


def _ratio(moved: float, whole: float) -> float:
    if math.isnan(moved) or math.isnan(whole):
        return math.inf
    if whole > 0:
        return moved / whole
    return math.inf if moved > 0 else 0.0
