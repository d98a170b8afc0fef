"""The coupled groups of a program in words: which weights share an axis, what one index of it is, and why it may not go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fxc.analysis.groups import NAMES, Group, groups
from fxc.ir.program import Program
from fxc.report.console import Output

_MEMBERS = 6


def show(output: Output, program: Program, every: bool) -> None:
    found = groups(program)
    free = [g for g in found if not g.pinned and (every or g.kind != "head_dim")]
    rows = [(g.name, f"{g.size} {NAMES[g.kind]}s", _members(g), _reads(g)) for g in free]
    output.table("may be pruned", ["module", "axis", "weights[dimension], indices of it for one unit", ""], rows)
    why: defaultdict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in found:
        if group.pinned and (every or group.kind != "other"):
            why[NAMES[group.kind], group.pinned].append(group)
    pinned = [(f"{kind}s", reason, len(its), _some(its)) for (kind, reason), its in why.items()]
    output.table("stays as it is", ["axis", "because", ">groups", "which (size)"], pinned)
    if not every:
        output.line("--all shows head widths, heights, widths and tables too")


def as_json(program: Program) -> list[dict[str, Any]]:
    return [
        {
            "module": g.name,
            "kind": g.kind,
            "size": g.size,
            "pinned": g.pinned,
            "weights": [{"name": m.fqn, "dimension": m.dim, "each": _each(m, g)} for m in g.members],
            "reads": None if g.source is None else {"module": g.source[0].name, "indices": g.source[1].tolist()},
        }
        for g in groups(program)
    ]


def _some(its: list[Group]) -> str:
    named = list(dict.fromkeys(f"{g.name} ({g.size})" for g in its))
    return ", ".join(named[:3]) + ", ..." * (len(named) > 3)


def _each(member: Any, group: Group) -> int:
    """How many indices of the dimension one unit has."""
    return int((member.units >= 0).sum()) // group.size


def _members(group: Group) -> str:
    prefix = f"{group.scope}." if group.scope else ""
    named = [
        f"{m.fqn.removeprefix(prefix)}[{m.dim}]" + (f" x{n}" if (n := _each(m, group)) > 1 else "")
        for m in group.members[:_MEMBERS]
    ]
    more = len(group.members) - _MEMBERS
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _reads(group: Group) -> str:
    if group.source is None:
        return ""
    source = group.source[0]
    return f"{group.size // source.size} read each of {source.size} KV heads"
