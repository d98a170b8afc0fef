"""Exchanges: from a choice that was measured to the best that differs from it in one group or two."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from fxc.selection.knapsack import Costs

_MOVES = 64


def neighbour(
    known: Sequence[int],
    options: Sequence[Mapping[int, Costs]],
    now: Sequence[Mapping[int, Costs]],
    aim: str,
    room: Mapping[str, float],
    tried: Collection[tuple[int, ...]],
) -> tuple[int, ...] | None:
    """The choice that differs from `known` in one group or two, is none of `tried`, and has the least of the cost `aim`; None
    where there is none. options: of each group what it may become, what that costs; now: the same with what it is in `known`;
    room: by how much each cost may rise."""
    usual = {name: max(sum(max(abs(c[name]) for c in each.values()) for each in options), 1e-30) for name in room}
    moves: list[tuple[int, int, dict[str, float], float]] = []
    for at, some in enumerate(options):
        was = now[at][known[at]]
        for number, costs in some.items():
            if number != known[at]:
                more = {name: costs[name] - was[name] for name in {*room, aim}}
                moves.append((at, number, more, sum(more[name] / usual[name] for name in room)))
    helps = sorted((m for m in moves if m[2][aim] < 0), key=lambda m: m[2][aim] / max(m[3], 1e-9))[:_MOVES]
    pays = sorted((m for m in moves if m[2][aim] >= 0 and m[3] < 0), key=lambda m: m[2][aim] / -m[3])[:_MOVES]
    best: tuple[float, tuple[int, ...]] | None = None
    pairs = ((a, b) for a in helps for b in pays if a[0] != b[0])
    for some in itertools.chain(((m,) for m in helps + pays), pairs):
        value = sum(m[2][aim] for m in some)
        if best is not None and value >= best[0]:
            continue
        if any(sum(m[2][name] for m in some) > left for name, left in room.items()) or (aim == "size" and value >= 0):
            continue
        other = list(known)
        for at, number, *_ in some:
            other[at] = number
        if tuple(other) not in tried:
            best = value, tuple(other)
    return None if best is None else best[1]
