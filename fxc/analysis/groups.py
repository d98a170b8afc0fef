"""Coupled groups: an axis as a user sees it. A unit of it (a head, a channel) lives in several weights and goes from all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx

from fxc.analysis.axes import analyse
from fxc.analysis.axis import DYNAMIC, Atom, Axis, atoms, resolve, units
from fxc.analysis.dims import Axes, Link, Site
from fxc.ir.program import Program

# The most telling role first: the output channels of a 1x1 convolution may be heads.
_KINDS = ("kv_head", "head", "head_dim", "expert", "row", "conv_group", "channel")
NAMES = {
    "head": "head", "kv_head": "KV head", "head_dim": "head width", "ffn": "FFN channel", "channel": "channel",
    "conv_group": "group of channels", "expert": "expert", "row": "row", "width": "width", "other": "index",
}  # fmt: skip
"""What one unit of each kind is called."""


@dataclass(frozen=True)
class Member:
    """A dimension of the constant `fqn` that the group runs along."""

    fqn: str
    dim: int
    axis: Axis = field(repr=False, compare=False)
    atom: Atom = field(repr=False, compare=False)

    @cached_property
    def units(self) -> Tensor:
        """[size of the dimension] int64: the unit that each position belongs to, -1 where none."""
        return units(self.axis, self.atom)


@dataclass(frozen=True)
class WeightedSite:
    """`node` multiplies its argument `operand`, along dimension `dim` of it, by a constant weight and sums over the group."""

    node: fx.Node
    operand: int
    dim: int
    weight: Member


@dataclass(eq=False)
class Group:
    """An axis that several weights share. kind: one of `NAMES`; size: its units; pinned: why none may go, or None; scope: the
    innermost module that all of `members` lie in; sites: where it is summed over with a constant weight; products: how
    often with a computed one; source: of query heads that share keys and values, the group of those and which of it each
    head reads."""

    atom: Atom
    kind: str
    size: int
    pinned: str | None
    scope: str
    members: list[Member]
    sites: list[WeightedSite]
    products: int
    source: tuple[Group, Tensor] | None = None
    name: str = ""
    """Its scope, or where another group of its kind has the same one, its first weight's name, numbered from the second on;
    no two groups of a kind share it."""


def groups(program: Program) -> list[Group]:
    """The groups of a program, in the order of the graph."""
    return groups_of(analyse(program))


def groups_of(axes: Axes) -> list[Group]:
    members: dict[Atom, list[Member]] = {}
    for fqn, dims in axes.constants.items():
        for dim, axis in enumerate(dims):
            for atom in dict.fromkeys(atoms(axis)):
                members.setdefault(atom, []).append(Member(fqn, dim, axis, atom))
    sites: dict[Atom, list[WeightedSite]] = {}
    products: dict[Atom, int] = {}
    for site in axes.sites:
        for atom in dict.fromkeys(atoms(site.axis)):
            weighted = _weighted(axes, site, atom)
            if weighted is None:
                products[atom] = products.get(atom, 0) + 1
            else:
                sites.setdefault(atom, []).append(weighted)
    found = {
        atom: Group(
            atom, _kind(atom, its, sites.get(atom, [])), atom.size, atom.pin, _scope([m.fqn for m in its]), its,
            sites.get(atom, []), products.get(atom, 0),
        )
        for atom, its in members.items()
        if atom is not DYNAMIC
    }  # fmt: skip
    for link in axes.links:
        _connect(found, link)
    taken = Counter((g.scope, g.kind) for g in found.values())
    seen: Counter[tuple[str, str]] = Counter()
    for group in found.values():
        name = group.scope if taken[group.scope, group.kind] == 1 and group.scope else group.members[0].fqn
        seen[name, group.kind] += 1
        # One weight may begin with several.
        group.name = name if seen[name, group.kind] == 1 else f"{name}.{seen[name, group.kind]}"
    return list(found.values())


def _weighted(axes: Axes, site: Site, atom: Atom) -> WeightedSite | None:
    arguments = [(site.node.args[operand], operand, dim) for operand, dim in site.reads]
    weights = [(a, operand, dim) for a, operand, dim in arguments if a.op == "get_attr"]
    data = [(operand, dim) for a, operand, dim in arguments if a.op != "get_attr"]
    if len(weights) != 1 or len(data) != 1:
        return None
    (weight, _, dim), (operand, data_dim) = weights[0], data[0]
    return WeightedSite(site.node, operand, data_dim, Member(weight.target, dim, axes.constants[weight.target][dim], atom))


def _kind(atom: Atom, members: list[Member], sites: list[WeightedSite]) -> str:
    kind = next((kind for kind in _KINDS if kind in atom.roles), None)
    if atom.pin and kind in (None, "channel") and len(sites) > 1:
        return "width"
    return kind or ("ffn" if sites and len(members) > 1 else "other")


def _scope(fqns: list[str]) -> str:
    paths = [fqn.split(".")[:-1] for fqn in fqns]
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _connect(found: dict[Atom, Group], link: Link) -> None:
    result, source = resolve(link.result), resolve(link.source)
    if isinstance(result, Atom) and isinstance(source, Atom) and result in found and source in found:
        found[result].source = found[source], link.index
