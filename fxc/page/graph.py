"""The graph of a program by blocks, each with its text: what a pass changed carries the name of that pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import fx

from fxc.calibrate.blocks import blocks
from fxc.ir.program import Program
from fxc.ir.text import Printer
from fxc.page.layers import GONE, SAME, UNKNOWN, Row, layers_read_by

# Characters of text: in all, and of one line.
MOST, LONGEST_LINE = 250_000, 240
_FEWEST_LINES = 12


@dataclass(frozen=True)
class Line:
    """by: the pass that made it, or that changed the layer which it reads, or ""."""

    text: str
    by: str


@dataclass(frozen=True)
class Part:
    """A block. title: what its layers have in common; changed: how many of its `layers` are not as they were; left: how many
    lines of its text are not here."""

    title: str
    layers: int
    changed: int
    lines: list[Line]
    left: int


def parts_of_graph(program: Program, rows: Sequence[Row]) -> list[Part]:
    """The blocks in order; a program that has none is one."""
    known = {row.name: row for row in rows if row.status != GONE}
    printer = Printer(program)
    printer.number()
    cut = [block.nodes for block in blocks(program, packed=True)]
    cut = cut or [[node for node in program.graph.nodes if node.op == "call_function"]]
    each = max(MOST // len(cut), _FEWEST_LINES * 80)
    return [_part(nodes, printer, known, each) for nodes in cut]


def _part(nodes: Sequence[fx.Node], printer: Printer, known: Mapping[str, Row], most: int) -> Part:
    read = {name: known[name] for node in nodes for name in layers_read_by(node) if name in known}
    lines, spent = [], 0
    for node in nodes:
        text = printer.line(node)
        text = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"
        spent += len(text) + 1
        if spent > most:
            break
        lines.append(Line(text, _changed_by(node, read)))
    changed = sum(row.status not in (SAME, UNKNOWN) for row in read.values())
    return Part(_title(list(read), nodes), len(read), changed, lines, len(nodes) - len(lines))


def _changed_by(node: fx.Node, read: Mapping[str, Row]) -> str:
    for name in layers_read_by(node):
        if name in read and read[name].decided:
            return read[name].decided[-1][0].partition(":")[0]
    return str(node.meta.get("by", "")).partition(":")[0]


def _title(names: list[str], nodes: Sequence[fx.Node]) -> str:
    """The module that all of the layers are in."""
    if not names:
        return nodes[0].meta.get("fqn") or "operators" if nodes else "nothing"
    paths = [name.split(".") for name in names]
    common = takewhile(lambda step: len(set(step)) == 1, zip(*paths))
    return ".".join(step[0] for step in common) or ", ".join(names[:3])
