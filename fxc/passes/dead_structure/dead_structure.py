"""Remove what does not matter, for real: heads, channels, branches and layers that are masked, pruned or constant.

    constant @down.weight: f32[4, 6]
    constant @up.weight: f32[6, 8]
    values @down.weight[:, 1:3] = 0
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 6] = aten.linear(%0, @up.weight)
    %2: f32[s0, 6] = aten.relu(%1)
    %3: f32[s0, 4] = aten.linear(%2, @down.weight)
    return "out" %3
    ---
    constant @down.weight: f32[4, 4]
    constant @up.weight: f32[4, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 4] = aten.linear(%0, @up.weight)
    %2: f32[s0, 4] = aten.relu(%1)
    %3: f32[s0, 4] = aten.linear(%2, @down.weight)
    return "out" %3
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxc.analysis.axes import analyse
from fxc.analysis.axis import Atom, atoms, kept
from fxc.analysis.dims import Axes
from fxc.analysis.groups import groups_of
from fxc.analysis.known import known_values
from fxc.analysis.liveness import Liveness, liveness, units_with
from fxc.ir.edit import sweep
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Pass, Refusal, Removal, Result
from fxc.passes.dead_structure.branches import drop_dead_cache, replace_constants
from fxc.passes.dead_structure.shrink import shrink
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS


def _first_dead(program: Program) -> dict[str, str]:
    if program.is_on_meta:
        return {}
    axes = analyse(program)
    found = _removable(axes, liveness(axes, known_values(program)))
    if not found:
        return {}
    group = next((g for g in groups_of(axes) if g.atom in found), None)
    if group is None:
        return {"": "an axis of no weight has dead indices"}
    return {group.members[0].fqn: f"{group.name} has a dead {group.kind}"}


NO_DEAD_STRUCTURE = Fact("no_dead_structure", _first_dead)
"""Every head, channel and layer may matter: none is masked to zero or constant."""


@dataclass(frozen=True)
class DeadStructure(Pass):
    """Remove heads, channels, branches and layers that provably do not matter, wherever they were masked."""

    name: ClassVar[str] = "dead_structure"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, DENSE_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({NO_DEAD_STRUCTURE})
    rounds: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        if program.is_on_meta:
            return result
        counts: Counter[tuple[str, str]] = Counter()
        first: dict[tuple[str, str], int] = {}
        rounds = 0
        while not context.rewrites.is_over and _round(program, result, counts, first):
            rounds += 1
            context.rewrites.may(f"round {rounds}")
        result.removed = [Removal(scope, kind, first[scope, kind], n) for (scope, kind), n in counts.items()]
        return result


def _round(program: Program, result: Result, counts: Counter, first: dict[tuple[str, str], int]) -> bool:
    """One round of looking and removing: what is gone may leave more that is dead."""
    known = known_values(program)
    branches = replace_constants(program, known)
    if branches:
        sweep(program)
    gone = drop_dead_cache(program)
    result.interface.drop(gone)
    if branches or gone:
        result.changed += branches + len(gone)
        return True
    axes = analyse(program)
    found = liveness(axes, known)
    removable = _removable(axes, found)
    if not removable:
        result.refusals = [Refusal(node.meta.get("fqn") or node.name, why) for node, why in found.kept]
        return False
    for group in groups_of(axes):
        if group.atom in removable:
            key = group.name, group.kind
            first.setdefault(key, group.size)
            counts[key] += int(removable[group.atom].sum())
    result.changed += sum(int(dead.sum()) for dead in removable.values())
    alive = {atom: ~dead for atom, dead in removable.items()}
    result.interface.cut(shrink(axes, alive, found.folds))
    sweep(program)
    return True


def _removable(axes: Axes, found: Liveness) -> dict[Atom, Tensor]:
    """The dead indices, less one of each axis that would be left without any: an axis goes with its branch or not at all."""
    removable = {atom: dead.clone() for atom, dead in found.dead.items()}
    for dead in removable.values():
        dead[0] &= not dead.all()
    before = -1
    while before != (before := sum(int(dead.sum()) for dead in removable.values())):
        for link in axes.links:
            # What such a last index is a copy of stays too.
            stays = torch.zeros(link.source.size, dtype=torch.bool)
            stays[link.index[kept(link.result, {atom: ~dead for atom, dead in removable.items()})]] = True
            for atom in set(atoms(link.source)) & removable.keys():
                removable[atom] &= ~units_with(link.source, atom, stays)
    return {atom: dead for atom, dead in removable.items() if dead.any()}
