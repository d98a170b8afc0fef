"""The layers of a compiled program as the rows of a table: what each was and is, who decided, and what was refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxc.analysis.groups import NAMES
from fxc.analysis.sizes import layers
from fxc.ir.names import layer_name, layer_of, parts_of
from fxc.ir.program import Program
from fxc.page import told

UNKNOWN, SAME, PACKED, SMALLER, GONE, NEW = "not recorded", "as it was", "packed", "smaller", "removed", "new"
BOTH = "smaller, packed"


@dataclass
class Row:
    """One layer. before, after: its kind, dtypes, shape, parameters and bytes, {} where it was not there or nobody recorded it;
    errors: by pass; decided: (pass, what it did); refused: (pass, why); place: of the first operator that reads it."""

    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    status: str
    place: int
    errors: list[tuple[str, float]] = field(default_factory=list)
    decided: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    microseconds: float | None = None

    @property
    def error(self) -> float | None:
        return max((error for _, error in self.errors), default=None)


def rows_of(
    program: Program, report: Mapping[str, Any], microseconds: Mapping[str, float] = {}
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """The rows in the order in which the program reads the layers, those that are gone last; and (pass, name, why) of what was
    refused that is no layer."""
    recorded = told.mapping(report.get("layers"))
    before = {name: _of_report(each) for name, each in recorded.items() if isinstance(each, dict)}
    after = {each.name: each.as_json() for each in layers(program)}
    places, makers = _readers(program)
    rows = {}
    for name in [*after, *(name for name in before if name not in after)]:
        was, now = before.get(name, {}), after.get(name, {})
        rows[name] = Row(name, was, now, _status(was, now, bool(before)), places.get(name, len(places)))
        rows[name].microseconds = told.number(microseconds.get(name))
    others: list[tuple[str, str, str]] = []
    for step in told.mappings(report.get("passes")):
        others += _follow(step, rows, makers)
    for pattern, names in told.mapping(report.get("skipped")).items():
        for name in told.texts(names):
            if layer_name(name) in rows:
                rows[layer_name(name)].refused.append(("skip", f"the pattern {pattern}"))
    return sorted(rows.values(), key=lambda row: (row.status == GONE, row.place, row.name)), others


def _of_report(each: Mapping[str, Any]) -> dict[str, Any]:
    shape = each.get("shape")
    return {
        "kind": told.text(each.get("kind")),
        "dtypes": told.text(each.get("dtypes")),
        "shape": [size for size in map(told.whole, shape if isinstance(shape, list) else []) if size is not None],
        "parameters": told.whole(each.get("parameters")),
        "bytes": told.whole(each.get("bytes")),
    }


def _status(before: Mapping[str, Any], after: Mapping[str, Any], is_recorded: bool) -> str:
    if not is_recorded:
        return UNKNOWN
    if not after:
        return GONE
    if not before:
        return NEW
    is_packed = (before["kind"], before["dtypes"]) != (after["kind"], after["dtypes"])
    if before["shape"] == after["shape"]:
        return PACKED if is_packed else SAME
    return BOTH if is_packed else SMALLER


def _readers(program: Program) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Of each layer the place of its first reader, and which passes made its readers."""
    places: dict[str, int] = {}
    makers: defaultdict[str, set[str]] = defaultdict(set)
    for node in program.graph.nodes:
        for name in layers_read_by(node):
            places.setdefault(name, len(places))
            if by := node.meta.get("by"):
                makers[name].add(by.partition(":")[0])
    return places, makers


def layers_read_by(node: Any) -> list[str]:
    """The layers whose constants a call reads, as `fxc.analysis.sizes.layers` names them."""
    if node.op != "call_function":
        return []
    packed = parts_of(node).values()
    read = [each.target for each in node.all_input_nodes if each.op == "get_attr"]
    return list(dict.fromkeys(layer_of(node, f) if f in packed else f.rpartition(".")[0] or f for f in read))


def _follow(step: Mapping[str, Any], rows: dict[str, Row], makers: Mapping[str, set[str]]) -> list[tuple[str, str, str]]:
    """Add to `rows` what a pass says of them; (pass, name, why) of what it refused that is no row."""
    name = told.text(step.get("name"), 80)
    short, others = name.partition(":")[0], []
    errors = dict(told.numbers(step.get("layer_errors")))
    removed = [each for each in told.mappings(step.get("removed")) if isinstance(each.get("scope"), str)]
    for row in rows.values():
        if row.name in errors:
            row.errors.append((name, errors[row.name]))
        what = [_gone(each) for each in removed if _touches(each["scope"], row)]
        if what:
            row.decided.append((name, "; ".join(what)))
        elif row.name in errors or (short in makers.get(row.name, ()) and row.status in (PACKED, BOTH, NEW)):
            row.decided.append((name, "rewrote it"))
    for each in told.mappings(step.get("refusals")):
        fqn, why = each.get("fqn"), told.text(each.get("reason"), 300)
        row = rows.get(layer_name(fqn)) if isinstance(fqn, str) else None
        if row is not None:
            row.refused.append((name, why))
        else:
            others.append((name, told.text(fqn), why))
    return others


def _touches(scope: str, row: Row) -> bool:
    changed = row.status == GONE or (row.before and row.after and row.before["shape"] != row.after["shape"])
    return bool(changed) and (not scope or row.name == scope or row.name.startswith(f"{scope}."))


def _gone(removal: Mapping[str, Any]) -> str:
    kind = told.text(removal.get("kind"))
    count, of = told.whole(removal.get("removed")), told.whole(removal.get("before"))
    return f"{count} of {of} {NAMES.get(kind, kind)}s of {told.text(removal['scope']) or 'the model'} go"
