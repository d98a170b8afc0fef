"""The order of passes, from the facts that they need, give and break.

A giver of a fact runs before those who need it and after those who owe it, and who breaks a fact after all who need it. Two
that each break what the other needs, layer by layer, can both run where one is limited to some layers (`only=`): it runs
first, and the other takes the rest. A pass that is needed or owed and not asked for is added when exactly one pass gives what
is missing and needs no options to do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Fact, Pass
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED

if TYPE_CHECKING:
    import networkx as nx

_AT_FIRST = (FLOAT_WEIGHTS, DENSE_WEIGHTS, UNSCALED, FULL_PRECISION)
"""What is true of every model that was not compressed before."""


@dataclass(frozen=True)
class Ordered:
    """passes: in the order to run; reasons: for each, why it stands where it does."""

    passes: list[Pass]
    reasons: list[list[str]]


def order(asked: Sequence[Pass], program: Program | None = None) -> Ordered:
    """Order the passes `asked` for. `program`, when given, tells which facts hold before the first one.

    Raises `UsageError` when two passes each have to run before the other, when a pass is given twice, or when nothing can
    give what a pass needs; it names the passes and the fact.
    """
    import networkx as nx  # here, so that loading a compiled model does not pay for it

    passes = _complete(list(asked), program)
    for_all = [p.name for p in passes if not p.limited_to() and not p.repeats]
    for name in for_all:
        if for_all.count(name) > 1:
            raise UsageError(f"the pass {name} is given twice", hint="give it once, with all of its options")
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, first in enumerate(passes):
        for j, second in enumerate(passes):
            if i == j:
                continue
            for fact in sorted(first.gives & second.needs, key=str):
                _because(graph, i, j, f"{first.name} gives {fact}, which {second.name} needs")
            for fact in sorted(first.owes & second.gives, key=str):
                _because(graph, i, j, f"{first.name} owes {fact}, which {second.name} gives")
            for fact in sorted(first.needs & second.breaks, key=str):
                if not _share(first, second):
                    _because(graph, i, j, f"{first.name} needs {fact}, which {second.name} breaks")
                elif not second.limited_to():
                    what = ", ".join(first.limited_to())
                    _because(graph, i, j, f"{first.name} is for {what} alone, and {second.name} takes the rest")
    _check_givers(passes, program)
    try:
        # Ties keep the order in which the user wrote the passes.
        indices = list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        cycle = nx.find_cycle(graph)
        why = "; ".join(r for i, j, *_ in cycle for r in graph.edges[i, j]["reasons"])
        both = " and ".join(dict.fromkeys(passes[i].name for i, *_ in cycle))
        raise UsageError(f"{both} each have to run before the other", why=why, hint="give only one of them") from None
    reasons = []
    for i in indices:
        said = [] if passes[i] in asked else [f"added: {_who_needs(passes, passes[i])}"]
        said += [r for j in graph.predecessors(i) for r in graph.edges[j, i]["reasons"]]
        reasons.append(said)
    return Ordered([passes[i] for i in indices], reasons)


def _share(first: Pass, second: Pass) -> bool:
    """Whether one of the two is limited to some layers, and each breaks, layer by layer, what the other needs."""
    is_limited = first.limited_to() or second.limited_to()
    each_breaks = (first.needs & second.breaks, second.needs & first.breaks)
    return bool(is_limited) and all(facts and all(fact.by_layer for fact in facts) for facts in each_breaks)


def _because(graph: nx.DiGraph, i: int, j: int, reason: str) -> None:
    if graph.has_edge(i, j):
        graph.edges[i, j]["reasons"].append(reason)
    else:
        graph.add_edge(i, j, reasons=[reason])


def _complete(passes: list[Pass], program: Program | None) -> list[Pass]:
    """`passes` and in front of them those that they need and that nobody asked for; not one that cannot run on `program` and
    has nothing to do there."""
    todo = list(passes)
    while todo:
        wanted = todo.pop()
        for fact in sorted(wanted.needs | wanted.owes, key=str):
            if any(fact in p.gives for p in passes):
                continue
            givers = [cls for cls in Pass.registry.values() if fact in cls.gives and not cls.is_policy]
            if len(givers) == 1:
                added = givers[0]()
                # In this order: whether there is dead structure takes a look at all weights.
                if program is not None and _cannot_run(added, program) and not _missing(fact, wanted, program):
                    continue
                passes.insert(0, added)
                todo.append(added)
    return passes


def _cannot_run(added: Pass, program: Program) -> bool:
    return any(fact in _AT_FIRST and _missing(fact, added, program) for fact in added.needs)


def _check_givers(passes: list[Pass], program: Program | None) -> None:
    for wanted in passes:
        for fact in sorted(wanted.needs, key=str):
            if not any(fact in p.gives for p in passes) and (why := _missing(fact, wanted, program)):
                hints = [f"{other.name}:{wanted.name}=false" for other in passes if getattr(other, wanted.name, False) is True]
                hints += ["start from the original model"] if fact in _AT_FIRST else []
                what = f"the pass {wanted.name} needs {fact}, which no pass gives"
                raise UsageError(what, why=why, hint=", or ".join(hints) or None)


def _missing(fact: Fact, wanted: Pass, program: Program | None) -> str | None:
    """Why `fact` does not hold at the start of what `wanted` is for."""
    if program is not None:
        found = fact.broken(program).items()
        return next((why for where, why in found if not fact.by_layer or wanted.covers(where)), None)
    return None if fact in _AT_FIRST else f"{fact} does not hold of a captured model"


def _who_needs(passes: list[Pass], giver: Pass) -> str:
    wants = [f"{p.name} needs {fact}" for p in passes for fact in sorted(p.needs & giver.gives, key=str)]
    wants += [f"{p.name} owes {fact}" for p in passes for fact in sorted(p.owes & giver.gives, key=str)]
    return ", ".join(wants)
