"""Axis analysis: which dimensions of which weights, values and inputs are one and the same, and which may lose indices."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fxc.analysis.axis import Atom, Axis, Product, atoms, pin, resolve
from fxc.analysis.dims import Axes, Link, fresh, join, pinned_for
from fxc.analysis.operators import operator_of
from fxc.ir.cache import cache_pairs
from fxc.ir.call import Call
from fxc.ir.program import Program


def analyse(program: Program) -> Axes:
    """The axes of every value. Needs shapes only, so that weights may be on meta."""
    axes = Axes(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            axes.values[node] = fresh(value)
        elif node.op == "get_attr":
            if node.target not in axes.constants:
                axes.constants[node.target] = fresh(value)
            axes.values[node] = axes.constants[node.target]
        elif node.op == "call_function" and isinstance(value, (Tensor, list, tuple)):
            call = Call(node)
            rule = operator_of(node.target).axes or pinned_for(f"{call.name} has no rule")
            axes.values[node] = rule(axes, call)
        else:
            axes.values[node] = ()
    _pin_interface(axes)
    _join_sources(axes)
    _pin_squares(axes)
    return axes


def _join_sources(axes: Axes) -> None:
    """Keys and values that the same query heads share are numbered alike, and go together."""
    first: dict[Axis, Link] = {}
    for link in axes.links:
        other = first.setdefault(resolve(link.result), link)
        if other is not link and torch.equal(other.index, link.index):
            join(other.source, link.source)


def _pin_squares(axes: Axes) -> None:
    """A position along an axis times itself is of two indices of it, and neither may go alone."""
    dims = [axis for its in axes.constants.values() for axis in its]
    for axis in {resolve(a) for a in (*dims, *(s.axis for s in axes.sites), *(x.source for x in axes.links))}:
        _pin_square(axis)


def _pin_square(axis: Axis) -> None:
    if isinstance(axis, Atom):
        return
    for part in axis.factors if isinstance(axis, Product) else axis.terms:
        _pin_square(part)
    if isinstance(axis, Product):
        its = Counter(atom for factor in axis.factors for atom in set(atoms(factor)))
        for atom in (a for a, count in its.items() if count > 1):
            pin(atom, "it is multiplied by itself")


def _pin_interface(axes: Axes) -> None:
    program = axes.program
    pairs = cache_pairs(program).values()
    placeholders, results = program.placeholders, program.results
    paired = {i for i, _ in pairs}, {o for _, o in pairs}
    for i, o in pairs:
        for a, b in zip(axes.values[placeholders[i]], axes.values[results[o]], strict=True):
            join(a, b)
    for node, declared, i in zip(placeholders, program.signature.inputs, range(len(placeholders))):
        if i not in paired[0]:
            for axis in axes.values[node]:
                pin(axis, f"it is a dimension of the input {declared.name}")
    for node, name, o in zip(results, program.signature.outputs, range(len(results))):
        if o not in paired[1]:
            for axis in axes.values[node]:
                pin(axis, f"it is a dimension of the output {name}")
