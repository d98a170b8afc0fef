"""Which dimensions before a reshape become which after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Regrouped = tuple[list[int], list[int]]


def regroup(before: Sequence[Any], after: Sequence[Any]) -> list[Regrouped]:
    """Groups (dimensions of `before`, dimensions of `after`) whose sizes multiply to the same, in row-major order and as
    small as can be. Dimensions of size 1 are in none. Sizes are integers or symbols; what cannot be told apart because of
    symbols is one group."""
    ins = [i for i, s in enumerate(before) if not _is_one(s)]
    outs = [i for i, s in enumerate(after) if not _is_one(s)]
    left: list[Regrouped] = []
    right: list[Regrouped] = []
    while ins and outs and _same(before[ins[0]], after[outs[0]]):
        left.append(([ins.pop(0)], [outs.pop(0)]))
    while ins and outs and (group := _last_group(ins, outs, before, after)):
        del ins[-len(group[0]) :], outs[-len(group[1]) :]
        right.insert(0, group)
    return left + ([(ins, outs)] if ins or outs else []) + right


def _last_group(ins: list[int], outs: list[int], before: Sequence[Any], after: Sequence[Any]) -> Regrouped | None:
    """The smallest group at the end, or None where a symbol stands in its way."""
    if _same(before[ins[-1]], after[outs[-1]]):
        return [ins[-1]], [outs[-1]]
    i = o = 1
    a, b = before[ins[-1]], after[outs[-1]]
    while isinstance(a, int) and isinstance(b, int) and a != b:
        if a < b and i < len(ins):
            i += 1
            a = a * before[ins[-i]] if isinstance(before[ins[-i]], int) else None
        elif b < a and o < len(outs):
            o += 1
            b = b * after[outs[-o]] if isinstance(after[outs[-o]], int) else None
        else:
            return None
    # Symbols are not compared with numbers, for that would fix them.
    return (ins[-i:], outs[-o:]) if isinstance(a, int) and isinstance(b, int) and a == b else None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.node.expr == b.node.expr
