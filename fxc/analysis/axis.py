"""Axes: what a dimension is made of, and the algebra that finds out.

A dimension starts as one atom. Where a reshape shows that it is a product (heads x head width) or a concatenation that it is
a sum (queries, keys, values), the atom is *defined* as that, and whatever shares it sees the same. Two dimensions that must
stay equal are unified; an atom that may not lose an index is pinned, and keeps the reason. Row-major order throughout: of a
product, the first factor varies slowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class Atom:
    """An axis that is not known to be made of others. size: how many indices it has; pin: why none may go, or None; roles:
    what the operators that saw it take it for ("head", "channel", ...)."""

    __slots__ = ("definition", "number", "pin", "roles", "size")
    count = 0

    def __init__(self, size: int, pin: str | None = None, roles: frozenset[str] = frozenset()):
        Atom.count += 1
        self.number, self.size, self.pin, self.roles = Atom.count, size, pin, roles
        self.definition: Axis | None = None

    def __repr__(self) -> str:
        return f"a{self.number}[{self.size}]"


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return math.prod(f.size for f in self.factors)


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return sum(t.size for t in self.terms)


Axis = Atom | Product | Sum
ONE = Product(())
"""Every dimension of size 1: it belongs to nothing, because it may be one that is broadcast."""
DYNAMIC = Atom(0, "its size is known only when the program runs")
"""Every dimension whose size is a symbol."""


class Mismatch(Exception):
    """Two axes of the same size have no common refinement."""


def resolve(axis: Axis) -> Axis:
    """The axis in terms of atoms without a definition: products hold no products, sums no sums, and a sum stands outside of
    a product wherever it is its first factor."""
    if isinstance(axis, Atom):
        if axis.definition is None:
            return axis
        axis.definition = resolve(axis.definition)
        return axis.definition
    if isinstance(axis, Sum):
        return sum_of(resolve(t) for t in axis.terms)
    return product_of(*(resolve(f) for f in axis.factors))


def product_of(*factors: Axis) -> Axis:
    flat: list[Axis] = []
    for factor in map(resolve, factors) if any(isinstance(f, Atom) and f.definition for f in factors) else factors:
        flat += factor.factors if isinstance(factor, Product) else [factor]
    if len(flat) == 1:
        return flat[0]
    if flat and isinstance(flat[0], Sum):
        return sum_of(product_of(term, *flat[1:]) for term in flat[0].terms)
    return Product(tuple(flat))


def sum_of(terms: Iterator[Axis] | list[Axis]) -> Axis:
    flat: list[Axis] = []
    for term in terms:
        term = resolve(term) if isinstance(term, Atom) else term
        flat += term.terms if isinstance(term, Sum) else [term]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def atoms(axis: Axis) -> Iterator[Atom]:
    axis = resolve(axis)
    if isinstance(axis, Atom):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.terms:
            yield from atoms(part)


def pin(axis: Axis, why: str) -> None:
    """Let no index of `axis` go. The first reason is kept."""
    for atom in atoms(axis):
        atom.pin = atom.pin or why


def give_role(axis: Axis, role: str) -> None:
    if axis is not DYNAMIC:
        for atom in atoms(axis):
            atom.roles |= {role}


def unify(a: Axis, b: Axis) -> None:
    """Make two dimensions the same axis. What has no common refinement is pinned instead, on both sides."""
    try:
        _unify(a, b)
    except Mismatch:
        pin(a, "it meets a dimension that is divided in another way")
        pin(b, "it meets a dimension that is divided in another way")


def _unify(a: Axis, b: Axis) -> None:
    a, b = resolve(a), resolve(b)
    if a is b or a == b:
        return
    if a is DYNAMIC or b is DYNAMIC or a.size != b.size:
        raise Mismatch
    if isinstance(a, Atom):
        _define(a, b)
    elif isinstance(b, Atom):
        _define(b, a)
    elif isinstance(a, Sum) or isinstance(b, Sum):
        terms = (list(x.terms) if isinstance(x, Sum) else [x] for x in (a, b))
        _unify_parts(*terms, cut)
    else:
        _unify_parts(list(a.factors), list(b.factors), split)


def _define(atom: Atom, axis: Axis) -> None:
    if any(a is atom for a in atoms(axis)):
        raise Mismatch
    atom.definition = axis
    for part in atoms(axis):
        part.pin = part.pin or atom.pin
        part.roles |= atom.roles


def _unify_parts(left: list[Axis], right: list[Axis], divide: Callable[[Axis, int], tuple[Axis, Axis]]) -> None:
    """Unify from the front, dividing the larger of two parts: terms by `cut`, factors by `split`."""
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size:
            x, rest = divide(x, y.size)
            left.insert(0, rest)
        elif y.size > x.size:
            y, rest = divide(y, x.size)
            right.insert(0, rest)
        _unify(x, y)


def split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """The two factors of `axis`, the first of size `outer`. Raises `Mismatch` where it has no such factors."""
    axis = resolve(axis)
    if outer == axis.size:
        return axis, ONE
    if outer == 1:
        return ONE, axis
    if axis is DYNAMIC or axis.size % outer:
        raise Mismatch
    inner = axis.size // outer
    if isinstance(axis, Atom):
        factors = Atom(outer, axis.pin, axis.roles), Atom(inner, axis.pin, axis.roles)
        axis.definition = Product(factors)
        return factors
    if isinstance(axis, Sum):
        if any(term.size % inner for term in axis.terms):
            raise Mismatch
        parts = [split(term, term.size // inner) for term in axis.terms]
        for _, low in parts[1:]:
            _unify(parts[0][1], low)
        return sum_of([high for high, _ in parts]), parts[0][1]
    first, *rest = axis.factors
    if outer >= first.size and outer % first.size == 0:
        high, low = split(product_of(*rest), outer // first.size)
        return product_of(first, high), low
    high, low = split(first, outer)
    return high, product_of(low, *rest)


def cut(axis: Axis, length: int) -> tuple[Axis, Axis]:
    """The first `length` indices of `axis` and the rest. Raises `Mismatch` where that goes through an index of a factor."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        if axis is DYNAMIC:
            raise Mismatch
        terms = Atom(length, axis.pin, axis.roles), Atom(axis.size - length, axis.pin, axis.roles)
        axis.definition = Sum(terms)
        return terms
    if isinstance(axis, Sum):
        first, *rest = axis.terms
        if length == first.size:
            return first, sum_of(rest)
        if length > first.size:
            head, tail = cut(sum_of(rest), length - first.size)
            return sum_of([first, head]), tail
        head, tail = cut(first, length)
        return head, sum_of([tail, *rest])
    first, *rest = axis.factors or [ONE]
    inner = product_of(*rest)
    if not axis.factors or length % inner.size:
        raise Mismatch
    head, tail = cut(first, length // inner.size)
    return product_of(head, inner), product_of(tail, inner)


def units(axis: Axis, atom: Atom) -> Tensor:
    """[axis.size] int64: which index of `atom` each position along `axis` belongs to, -1 where none."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return torch.arange(axis.size) if axis is atom else torch.full((axis.size,), -1)
    if isinstance(axis, Sum):
        return torch.cat([units(term, atom) for term in axis.terms])
    found = torch.full((1,), -1)
    for factor in axis.factors:
        found = torch.maximum(found[:, None], units(factor, atom)[None, :]).flatten()
    return found


def kept(axis: Axis, alive: dict[Atom, Tensor]) -> Tensor:
    """[axis.size] bool: which positions along `axis` stay when of each atom in `alive` only the true indices do."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return alive[axis] if axis in alive else torch.ones(axis.size, dtype=torch.bool)
    if isinstance(axis, Sum):
        return torch.cat([kept(term, alive) for term in axis.terms])
    found = torch.ones(1, dtype=torch.bool)
    for factor in axis.factors:
        found = (found[:, None] & kept(factor, alive)[None, :]).flatten()
    return found
