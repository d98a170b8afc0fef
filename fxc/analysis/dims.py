"""What the analysis of axes finds, and what the rules of operators say it with.

An operator that sums over a dimension of its operands has a `Site` there; one that reads an axis through a fixed index has a
`Link`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxc.analysis.axis import DYNAMIC, ONE, Atom, Axis, Mismatch, cut, give_role, pin, resolve, unify
from fxc.ir.call import Call
from fxc.ir.program import Program

Dims = tuple[Axis, ...]
"""The axes of a tensor; a tuple of them for a value of several tensors."""


@dataclass(frozen=True)
class Site:
    """Where `node` sums over `axis`. reads: (argument, dimension) of the operands that have it; an argument within a list
    is a tuple of two indices."""

    node: fx.Node
    axis: Axis
    reads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Link:
    """Index i of `result` is a copy of index `index[i]` of `source`: query heads that share their keys and values. copies:
    the axis that an expand made and a reshape merged, if that is how it is written."""

    node: fx.Node
    result: Atom
    source: Axis
    index: Tensor
    copies: Atom | None = None


@dataclass
class Axes:
    """What `analyse` found: the axes of every value and constant, the sites and the links."""

    program: Program
    values: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[str, Dims] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    copies: dict[Atom, fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Dims:
        return tuple(resolve(a) for a in self.values[node])

    def pin_all(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            for axis in _every(self.values.get(source, ())):
                pin(axis, why)


def _every(dims: Any) -> list[Axis]:
    return [axis for part in dims for axis in (_every(part) if isinstance(part, tuple) else [part])]


def fresh(value: Any, why: str | None = None) -> Any:
    """New atoms for the dimensions of a value, pinned for the reason `why` if there is one."""
    if isinstance(value, Tensor):
        return tuple(fresh_axis(size, why) for size in value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(fresh(v, why) for v in value)
    return ()


def fresh_axis(size: Any, why: str | None = None) -> Axis:
    if not isinstance(size, int):
        return DYNAMIC
    return ONE if size == 1 else Atom(size, why)


def join(a: Axis, b: Axis) -> Axis:
    """The axis of two dimensions that meet: the same one, or the one that the other is broadcast along."""
    # A single index never goes, whatever it is a part of.
    if a.size == 1:
        return b
    if b.size == 1 or a is b:
        return a
    unify(a, b)
    return a


def broadcast(shapes: Sequence[Sequence[Axis]]) -> list[Axis]:
    """The axes of what comes of shapes that are broadcast from the right."""
    result: list[Axis] = [ONE] * max((len(s) for s in shapes), default=0)
    for shape in shapes:
        offset = len(result) - len(shape)
        for i, axis in enumerate(shape):
            result[offset + i] = join(result[offset + i], axis)
    return result


def pinned(axes: Axes, call: Call, why: str) -> Any:
    """The axes of a result of which nothing can be said: its operands keep all of their indices, and so does it."""
    axes.pin_all(call.node, why)
    return fresh(call.value, why)


def pinned_for(why: str) -> Any:
    """The rule of an operator of which nothing can be said."""
    return lambda axes, call: pinned(axes, call, why)


def piece(axis: Axis, first: int, last: int) -> Axis:
    """The indices `first` to `last` of an axis. Raises `Mismatch` where a bound goes through an index of a factor."""
    if first == last:
        raise Mismatch
    if first:
        axis = cut(axis, first)[1]
    if last - first < axis.size:
        axis = cut(axis, last - first)[0]
    return ONE if axis.size == 1 else axis


def listed_dims(argument: Any, rank: int) -> list[int]:
    """The dimensions that an argument names, from 0 on; None and [] name all."""
    if argument is None or argument == []:
        return list(range(rank))
    return [d % rank for d in (argument if isinstance(argument, (list, tuple)) else [argument])]


def by_spec(axes: Axes, call: Call, spec: str, chosen: dict[str, str] | None = None) -> Dims:
    """The axes by an einsum: a letter that stands twice is one axis; one that is not in the result is summed over, which makes
    a site; "..." are any dimensions, broadcast from the right; what is marked with "!" keeps its size for the reason that
    `chosen` has for it."""
    left, right = spec.split("->")
    letters: dict[str, Axis] = {}
    reads: dict[str, list[tuple[int, int]]] = {}
    rest: list[Axis] = []
    for position, operand in enumerate(left.split(",")):
        argument = call[position]
        if not isinstance(argument, fx.Node):
            continue
        dims = axes.values[argument]
        before, dots, after = operand.strip().partition("...")
        first, last = before.split(), after.split()
        named = list(zip(first, range(len(first)))) + list(zip(last, range(len(dims) - len(last), len(dims))))
        for name, dimension in named:
            letter = name.lstrip("!")
            letters[letter] = join(letters.get(letter, ONE), dims[dimension])
            reads.setdefault(letter, []).append((position, dimension))
            if name.startswith("!"):
                pin(dims[dimension], chosen[letter])
                give_role(dims[dimension], letter)
        if dots:
            rest = broadcast([rest, list(dims[len(first) : len(dims) - len(last)])])
    result = right.split()
    for letter, axis in letters.items():
        if letter not in result and len(reads[letter]) > 1 and letter not in (chosen or ()):
            axes.sites.append(Site(call.node, axis, tuple(reads[letter])))
    return tuple(axis for name in result for axis in (rest if name == "..." else [letters[name]]))
