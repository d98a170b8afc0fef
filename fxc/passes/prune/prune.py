"""Decide which heads, channels and layers go, and mask them; `dead_structure` then removes them.

    passes prune:ffn=0.5
    constant @down.weight: f32[4, 6]
    constant @up.weight: f32[6, 8]
    values @up.weight[0:3] = 0.01
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 6] = aten.linear(%0, @up.weight)
    %2: f32[s0, 6] = aten.relu(%1)
    %3: f32[s0, 4] = aten.linear(%2, @down.weight)
    return "out" %3
    ---
    values @down.weight[:, 0:3] = 0
    constant @down.weight: f32[4, 6]
    constant @up.weight: f32[6, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 6] = aten.linear(%0, @up.weight)
    %2: f32[s0, 6] = aten.relu(%1)
    %3: f32[s0, 4] = aten.linear(%2, @down.weight)
    return "out" %3
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxc.analysis.groups import NAMES, Group, groups
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Pass, Refusal, Removal, Result, check_data_is_given
from fxc.passes.dead_structure.dead_structure import NO_DEAD_STRUCTURE
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED
from fxc.passes.learning import announce_backward
from fxc.passes.prune.amount import choose
from fxc.passes.prune.blocks import Block, block_at, blocks, influence, others, take_out
from fxc.passes.prune.mask import mask, unmaskable
from fxc.passes.prune.plan import Drop, parse_drops, parse_numbers, read_plan
from fxc.passes.prune.scores import NEED_DATA, NEED_GRADIENTS, Criterion, scores

BUDGET = 0.02
_PLURALS = {"head": "heads", "ffn": "ffn", "channel": "channels"}
_UNIFORM_STEPS = 64


@dataclass(frozen=True)
class Prune(Pass):
    """Mask the least important heads, FFN channels and convolution channels, and drop whole layers.

    amount: "auto", which is what `prune` alone means: the most heads and channels, never more than half of those of a layer,
    that keep the loss of quality within `budget`, found by bisection over a ranking of the whole model, or with uniform=true
    over a share that is the same everywhere. What is measured is the loss of the next token on calibration data, or how far
    the outputs move (`Judge` of amount.py). Or in so many words: heads, ffn, channels, layers: the share of each that goes,
    from 0 to below 1. criterion: l2, l1 (magnitude), bn_scale, or from calibration data wanda, taylor, mask_gradient; auto is
    taylor for amount=auto, and else l2; layers always go by how little they change their input, which needs data. scope:
    whether units compete within their layer or over the whole model. round_to: channels are kept in multiples of it. uniform:
    every layer keeps as many as the others, and every KV head as many query heads, so that the result can be said in a Hugging
    Face configuration. drop: explicit decisions, "MODULE/heads/0+5;MODULE"; plan: a JSON file of them. keep: the numbers of the
    layers that stay, "0;2;4", while all others are dropped.
    """

    amount: Literal["", "auto"] = ""
    budget: float = BUDGET
    heads: float = 0.0
    ffn: float = 0.0
    channels: float = 0.0
    layers: float = 0.0
    criterion: Literal["auto", Criterion] = "auto"
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    uniform: bool = False
    drop: str = ""
    plan: str = ""
    keep: str = ""

    name: ClassVar[str] = "prune"
    is_policy: ClassVar[bool] = True
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS, UNSCALED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({NO_DEAD_STRUCTURE})
    owes: ClassVar[frozenset[Fact]] = frozenset({NO_DEAD_STRUCTURE})
    # How far the outputs move is what the user asked for: it is measured, reported, and limited only by --budget.
    limits: ClassVar[tuple[float, float]] = (float("inf"), float("inf"))
    shrinks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("heads", "ffn", "channels", "layers"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise UsageError(f"{name}={share} is not a share from 0 to below 1", where="prune", hint=f"prune:{name}=0.25")
        if self.round_to < 1:
            raise UsageError(f"round_to={self.round_to} is not a positive number", where="prune")
        if self.uniform and self.scope == "global":
            raise UsageError("uniform=true keeps the layers alike, and scope=global does not", where="prune")
        says = [name for name in ("heads", "ffn", "channels", "layers", "drop", "plan", "keep") if getattr(self, name)]
        if not 0 <= self.budget < float("inf"):
            raise UsageError(f"budget={self.budget} is not a share of the loss", where="prune", hint="prune:budget=0.02")
        if says and (self.amount or self.budget != BUDGET):
            given = f"amount={self.amount}" if self.amount else f"budget={self.budget}"
            raise UsageError(
                f"{given} lets prune choose how much goes, and {says[0]}= says it", where="prune", hint="give one of the two"
            )
        # As it can be written in a list of passes.
        object.__setattr__(self, "keep", ";".join(map(str, parse_numbers(self.keep))))
        object.__setattr__(self, "drop", ";".join(map(str, parse_drops(self.drop))))

    @property
    def is_auto(self) -> bool:
        return not (self.heads or self.ffn or self.channels or self.layers or self.drop or self.plan or self.keep)

    def uses_data(self) -> bool:
        return self.is_auto or self._needs_data()

    def _needs_data(self) -> bool:
        return self.layers > 0 or ((self.heads or self.ffn or self.channels) > 0 and self.criterion in NEED_DATA)

    def needs_data(self) -> str | None:
        if not self._needs_data():
            return None
        return "layers are" if self.layers else f"criterion={self.criterion} is"

    def may_change_nothing(self) -> bool:
        return self.is_auto

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        if program.is_on_meta:
            raise UsageError("weights on meta have no magnitudes to prune by", where="prune")
        check_data_is_given([self], bool(context.samples))
        if self.is_auto:
            self._prune_within_budget(program, context, result)
            return result
        drops = parse_drops(self.drop) + (read_plan(self.plan) if self.plan else ())
        self._drop(program, drops, context, result)
        if self.keep:
            for scope in others(program, parse_numbers(self.keep)):
                _take_out(program, scope, context, result)
        if self.layers:
            self._drop_layers(program, context, result)
        shares = {"head": self.heads, "ffn": self.ffn, "channel": self.channels}
        self._prune_units(program, {kind: share for kind, share in shares.items() if share}, context, result)
        return result

    # ------------------------------------------------------------------------------------------------------- by importance

    def _candidates(self, program: Program, kinds: Iterable[str], context: Context, result: Result) -> dict[str, list[Group]]:
        """The groups of these kinds that may lose units; of the others the result says why not."""
        candidates: dict[str, list[Group]] = {kind: [] for kind in kinds}
        for group in groups(program):
            if group.kind not in candidates:
                continue
            if pattern := context.skips(group.name):
                result.refusals.append(Refusal(group.name, f"skipped by the pattern {pattern}"))
            elif reason := unmaskable(group):
                result.refusals.append(Refusal(group.name, f"its {NAMES[group.kind]}s stay: {reason}"))
            elif self.uniform and not _is_even(group):
                why = "uniform=true, and its KV heads have different numbers of query heads"
                result.refusals.append(Refusal(group.name, why))
            elif self.uniform and not any(part.isdecimal() for part in group.members[0].fqn.split(".")):
                result.refusals.append(Refusal(group.name, "uniform=true prunes the numbered layers only"))
            else:
                candidates[group.kind].append(group)
        return candidates

    def _prune_within_budget(self, program: Program, context: Context, result: Result) -> None:
        kinds = self._candidates(program, _PLURALS, context, result)
        candidates = [g for its in kinds.values() for g in its if g.size > 1]
        criterion = "taylor" if self.criterion == "auto" else self.criterion
        if criterion in NEED_GRADIENTS:
            announce_backward(self, program, context)
        choice = choose(program, candidates, context, self.budget, criterion, self._amounts)
        result.refusals += [Refusal(g.name, f"{criterion} says nothing about it") for g in choice.unscored]
        drops = []
        for group, units in choice.units.items():
            if _mask(program, group, units, context, result):
                drops.append(Drop(group.name, _PLURALS[group.kind], tuple(sorted(units.tolist()))))
        result.notes = choice.notes
        if drops:
            result.repeat = Prune(drop=";".join(map(str, drops)))

    def _amounts(
        self, found: Mapping[Group, Tensor], order: list[tuple[Group, int]]
    ) -> tuple[int, Callable[[int], dict[Group, Tensor]]]:
        """How many steps there are from nothing to half of everything, and what goes at each."""

        def of_the_ranking(step: int) -> dict[Group, Tensor]:
            counts = Counter(group for group, _ in order[:step])
            return {g: found[g].argsort(stable=True)[: self._count(g, n)] for g, n in counts.items() if self._count(g, n)}

        def alike(step: int) -> dict[Group, Tensor]:
            picked = self._layer_by_layer(list(found), found, step / (2 * _UNIFORM_STEPS))
            return {g: units for g, units in picked if len(units)}

        return (_UNIFORM_STEPS, alike) if self.uniform else (len(order), of_the_ranking)

    def _prune_units(self, program: Program, shares: dict[str, float], context: Context, result: Result) -> None:
        criterion = "l2" if self.criterion == "auto" else self.criterion
        candidates = self._candidates(program, shares, context, result)
        groups = [g for gs in candidates.values() for g in gs]
        if criterion in NEED_GRADIENTS:
            announce_backward(self, program, context)
        found = scores(program, groups, criterion, context.samples, context.track, context.seed)
        for kind, share in shares.items():
            scored = [g for g in candidates[kind] if g in found]
            for group in candidates[kind]:
                if group not in found:
                    result.refusals.append(Refusal(group.name, f"{criterion} says nothing about it"))
            if not scored:
                result.refusals.append(Refusal("", f"the model has no {NAMES[kind]}s that can be pruned by {criterion}"))
            choose_units = self._over_the_model if self.scope == "global" else self._layer_by_layer
            for group, units in choose_units(scored, found, share):
                _mask(program, group, units, context, result)

    def _layer_by_layer(
        self, candidates: Sequence[Group], found: Mapping[Group, Tensor], share: float
    ) -> Iterable[tuple[Group, Tensor]]:
        for group in candidates:
            if self.uniform and group.kind == "head" and group.source is not None:
                yield group, _alike(group, found[group], share, (group.size + 1) // 2 if self.is_auto else 1)
            else:
                count = self._count(group, share * group.size)
                yield group, found[group].argsort(stable=True)[:count]

    def _over_the_model(
        self, candidates: Sequence[Group], found: Mapping[Group, Tensor], share: float
    ) -> Iterable[tuple[Group, Tensor]]:
        # Gradients compare layers; weights of one layer are larger than those of another for no reason of importance.
        means = {g: 1.0 if self.criterion == "taylor" else found[g].mean().item() or 1.0 for g in candidates}
        comparable = {g: found[g] / means[g] for g in candidates}
        ranked = sorted((comparable[g][u].item(), i, u) for i, g in enumerate(candidates) for u in range(g.size))
        most = round(share * len(ranked))
        chosen: list[list[int]] = [[] for _ in candidates]
        for _, i, unit in ranked:
            if most and len(chosen[i]) < candidates[i].size - self._least(candidates[i]):
                chosen[i].append(unit)
                most -= 1
        for group, units in zip(candidates, chosen, strict=True):
            # Rounding may take some more of the group than were chosen, or some fewer.
            yield group, found[group].argsort(stable=True)[: self._count(group, len(units))]

    def _least(self, group: Group) -> int:
        return min(group.size, 1 if group.kind == "head" else self.round_to)

    def _count(self, group: Group, wanted: float) -> int:
        """How many units go when `wanted` should: at least one stays, and of channels a multiple of round_to. Within a budget
        rounding never takes more."""
        keep = group.size - (math.floor(wanted) if self.is_auto else round(wanted))
        if group.kind != "head":
            multiples = keep / self.round_to
            keep = (math.ceil(multiples) if self.is_auto else round(multiples)) * self.round_to
        return group.size - min(max(keep, self._least(group)), group.size)

    # ----------------------------------------------------------------------------------------------------------- whole layers

    def _drop_layers(self, program: Program, context: Context, result: Result) -> None:
        found, why = blocks(program)
        candidates = [b for b in found if not context.skips(b.scope)]
        result.refusals += [Refusal(scope, f"it is no layer: {reason}") for scope, reason in why.items()]
        count = min(round(self.layers * len(found)), len(candidates), len(found) - 1)
        if not candidates:
            result.refusals.append(Refusal("", "the model has no numbered layers that can be dropped"))
            return
        samples = context.track(context.samples, "measuring what each layer changes", len(context.samples))
        changes = influence(program, candidates, samples)
        for block in sorted(candidates, key=lambda b: changes[b])[: max(count, 0)]:
            _take_out(program, block.scope, context, result)

    # --------------------------------------------------------------------------------------------------------------- by decree

    def _drop(self, program: Program, drops: Sequence[Drop], context: Context, result: Result) -> None:
        for each in drops:
            if not each.kind:
                _take_out(program, each.module, context, result)
        wanted = [each for each in drops if each.kind]
        there = groups(program) if wanted else []
        for each in wanted:
            group = _group_at(there, each)
            units = torch.tensor(each.units)
            if each.kind == "kv_heads":
                units = torch.isin(group.source[1], units).nonzero().flatten()
            if len(units) >= group.size:
                raise UsageError(
                    f"these are all of its {group.size} {NAMES[group.kind]}s",
                    where=str(each),
                    hint=f"drop {each.module} itself",
                )
            _mask(program, group, units, context, result)


def _is_even(group: Group) -> bool:
    """Whether as many query heads in a row read each KV head."""
    if group.source is None:
        return True
    source, index = group.source
    return torch.equal(index, torch.arange(source.size).repeat_interleave(group.size // source.size))


def _alike(group: Group, found: Tensor, share: float, least: int) -> Tensor:
    """The least important query heads such that each KV head that stays keeps as many as the others: the numbers of KV heads
    and of query heads to each of them that come nearest to what should stay, the more of both the better; `least` heads or
    more stay."""
    source, _ = group.source
    each = group.size // source.size
    keep = group.size - round(share * group.size)
    sizes = itertools.product(range(1, source.size + 1), range(1, each + 1))
    sizes = [s for s in sizes if s[0] * s[1] >= least]
    kv_heads, of_each = min(sizes, key=lambda s: (abs(s[0] * s[1] - keep), -s[0] * s[1], -s[1]))
    by_kv_head = found.reshape(source.size, each)
    best = by_kv_head.argsort(dim=1, stable=True)[:, each - of_each :]
    kept = by_kv_head.gather(1, best).sum(1).argsort(stable=True)[source.size - kv_heads :]
    goes = torch.ones(source.size, each, dtype=torch.bool)
    goes[kept[:, None], best[kept]] = False
    return goes.flatten().nonzero().flatten()


def _mask(program: Program, group: Group, units: Tensor, context: Context, result: Result) -> bool:
    """Whether it was masked: not where nothing goes, nor beyond the limit of rewrites."""
    if not len(units) or not context.rewrites.may(group.name):
        return False
    mask(program, group, units)
    result.changed += len(units)
    result.removed.append(Removal(group.name, group.kind, group.size, len(units)))
    return True


def _take_out(program: Program, scope: str, context: Context, result: Result) -> None:
    if not context.rewrites.may(scope):
        return
    # Taking out another layer may have changed what this one reads.
    block = block_at(program, scope)
    if not isinstance(block, Block):
        raise UsageError("it cannot be dropped as a whole", where=scope, why=block, hint="'fxc inspect MODEL' lists modules")
    take_out(program, block)
    result.changed += 1
    result.removed.append(Removal(scope, "layer", 1, 1))


def _group_at(there: Sequence[Group], drop: Drop) -> Group:
    """The one group of the kind in or around the module. Raises `UsageError` where there is none, or several, or a unit of it
    is not there."""
    kind = "head" if drop.kind == "kv_heads" else next(k for k, plural in _PLURALS.items() if plural == drop.kind)
    its = [g for g in there if g.kind == kind]
    exact = [g for g in its if g.name == drop.module or g.scope == drop.module]
    inside = exact or [g for g in its if any(m.fqn.startswith(f"{drop.module}.") for m in g.members)]
    inside = inside if len(inside) < 2 else [g for g in inside if g.scope.startswith(drop.module)] or inside
    if drop.kind == "kv_heads":
        inside = [g for g in inside if g.source is not None]
    if len(inside) != 1:
        names = ", ".join(g.name for g in (inside or its)[:8]) or "none in this model"
        raise UsageError(
            f"{len(inside) or 'no'} groups of {drop.kind} are in it", where=drop.module, hint=f"name one of: {names}"
        )
    group = inside[0]
    size = group.source[0].size if drop.kind == "kv_heads" else group.size
    if reason := unmaskable(group):
        raise UsageError(f"its {NAMES[group.kind]}s have to stay", where=drop.module, why=reason)
    if max(drop.units) >= size:
        raise UsageError(f"it has {drop.kind} 0 to {size - 1}, not {max(drop.units)}", where=drop.module)
    return group


def with_drops(passes: Sequence[Pass], drops: Sequence[str], plan: str) -> list[Pass]:
    """`passes` with these decisions given to the prune pass among them, or to a new one in front."""
    text = ";".join(str(d) for each in drops for d in parse_drops(each))
    given = {"drop": text, "plan": plan}
    if not text and not plan:
        return list(passes)
    if not any(isinstance(p, Prune) for p in passes):
        return [Prune(**given), *passes]
    return [dataclasses.replace(p, **given) if isinstance(p, Prune) else p for p in passes]
