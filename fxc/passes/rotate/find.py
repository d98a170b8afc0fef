"""Which axes of a program may be turned: those that layers write and read, and that norms or attention have in between."""

from __future__ import annotations

import torch
from torch import fx

from fxc.analysis.axes import analyse
from fxc.analysis.axis import Atom, atoms
from fxc.analysis.dims import Axes
from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.passes.rotate.stream import ATTENTION, EMBEDDING, LINEAR, NORMS, PRODUCTS, Stream

aten = torch.ops.aten


def streams(program: Program) -> list[Stream]:
    """The axes that are normalised over, and that whole layers write and read."""
    axes = analyse(program)
    found: dict[Atom, None] = {}
    written, read = _layered(axes, whole=True)
    for node in program.graph.nodes:
        squares = node.target is aten.pow.Tensor_Scalar and any(user.target is aten.mean.dim for user in node.users)
        if (node.target in NORMS or squares) and isinstance(axis := axes.of(node.args[0])[-1], Atom):
            found.setdefault(axis)
    return _touching(axes, [atom for atom in found if atom in written and atom in read])


def heads(program: Program) -> list[Stream]:
    """The widths of the values of attention, which layers write and read head by head."""
    axes = analyse(program)
    found: dict[Atom, None] = {}
    written, read = _layered(axes, whole=False)
    for node in program.graph.nodes:
        value = Call(node)["value"] if node.target is ATTENTION else node.args[1] if node.target in PRODUCTS else None
        if value is not None and isinstance(axis := axes.of(value)[-1], Atom) and axis.size > 1:
            found.setdefault(axis)
    return _touching(axes, [atom for atom in found if atom in written and atom in read])


def _layered(axes: Axes, *, whole: bool) -> tuple[set[Atom], set[Atom]]:
    """The atoms that layers write and those that they read; whole: as all of a dimension, or as a part of it too."""
    written: set[Atom] = set()
    read: set[Atom] = set()
    for node in axes.program.graph.nodes:
        if node.target is LINEAR and node.args[1].op == "get_attr":
            pairs = zip((written, read), axes.of(node.args[1]), strict=True)
        elif node.target is EMBEDDING and node.args[0].op == "get_attr":
            pairs = [(written, axes.of(node.args[0])[-1])]
        else:
            continue
        for into, axis in pairs:
            into |= {axis} if whole and isinstance(axis, Atom) else set() if whole else set(atoms(axis))
    return written, read


def _touching(axes: Axes, wanted: list[Atom]) -> list[Stream]:
    found = {atom: Stream(axes, atom, []) for atom in wanted}
    held: dict[fx.Node, set[Atom]] = {}
    for node in axes.program.graph.nodes:
        parts = [part if isinstance(part, tuple) else (part,) for part in axes.values.get(node, ())]
        held[node] = {atom for part in parts for axis in part for atom in atoms(axis) if atom in found}
        for atom in held[node].union(*(held[each] for each in node.all_input_nodes)):
            found[atom].nodes.append(node)
    return list(found.values())
