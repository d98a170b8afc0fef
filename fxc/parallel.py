"""One program as several processes run it together: each has a part of the heads and of the FFN channels.

An axis is cut as removal cuts it (`fxc.passes.dead_structure`), but each process keeps another part, and what the layers give
that sum over the axis is added up over the processes. Of one of two:

    %1: f32[s0, 160] = aten.linear(%0, @up.weight)          ->  %1: f32[s0, 80] = aten.linear(%0, @up.weight)
    %2: f32[s0, 160] = aten.silu(%1)                        ->  %2: f32[s0, 80] = aten.silu(%1)
    %3: f32[s0, 64] = aten.linear(%2, @down.weight)         ->  %3: f32[s0, 64] = aten.linear(%2, @down.weight)
                                                                %4: f32[s0, 64] = fxc_ranks.all_reduce(%3)

Packed weights keep their groups and scales whole, and what is rounded by the range of a row is rounded by that of the whole row
(of 2:4 sparse int8 by that of the part). Query heads that share keys and values go together, but where there are more
processes than heads of keys: then several processes hold the same ones. This is the tensor parallelism of Megatron-LM
(Shoeybi et al., 2019), with the pairs of layers found by the axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxc.analysis.axes import analyse
from fxc.analysis.axis import Atom, Axis, atoms, kept, resolve, units
from fxc.analysis.dims import Axes
from fxc.analysis.groups import NAMES, Group, groups_of
from fxc.analysis.liveness import units_with
from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.ir.check import check
from fxc.ir.edit import call, constant, free_name, insert, read, sweep
from fxc.ir.names import parts_of
from fxc.ir.program import Program
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.dead_structure.shrink import shrink
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR, product_of, scheme_of
from fxc_kernels.collectives import ALL_REDUCE, RANGE, WITH_RANGE

KINDS = ("head", "ffn")
PRODUCTS = (LINEAR, GROUPED_LINEAR)
BY = "parallel"


@dataclass(frozen=True)
class Division:
    """number: of this process among `count`; parts: axis -> how many of its indices each process has, nothing where this one
    has shapes alone; whole: axis -> why every process has all of it."""

    number: int
    count: int
    parts: dict[str, list[int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"process {self.number + 1} of {self.count}: {len(self.parts)} axes are divided"]
        return "\n".join(told + [f"whole in every process: {name}: {why}" for name, why in self.whole.items()])


@dataclass
class _Packed:
    """A product as it was: its operator, its arguments by name, and of the parts of its weight names and values."""

    operator: Any
    given: dict[str, Any]
    parts: dict[str, tuple[str, Tensor]]
    by: str


def divide(program: Program, number: int, count: int) -> tuple[Program, Division]:
    """What the process `number` of `count` runs of `program`, which is not changed, and what was divided.

    All processes have to be given the same program, and inputs that are the same, but for a decoder's cache, of which each has
    the heads that it computes. Raises UsageError where nothing can be divided.
    """
    program, division = program.copy(), Division(number, count)
    Canonicalize().run(program, Context())
    packed = _in_floats(program)
    axes = analyse(program)
    alive: dict[Atom, Tensor] = {}
    summed: dict[fx.Node, None] = {}
    used: dict[str, Atom] = {}
    members: dict[str, set[Atom]] = {}
    every = {each.atom: each for each in groups_of(axes)}
    found = [each for each in every.values() if each.kind in KINDS and each.size > 1]
    for group in sorted(found, key=lambda each: KINDS.index(each.kind)):
        name = f"the {NAMES[group.kind]}s of {group.name}"
        shared = [atom for link in axes.links if resolve(link.result) is group.atom for atom in atoms(link.source)]
        cut = {each.fqn for atom in (group.atom, *shared) if atom in every for each in every[atom].members}
        why = _why_whole(axes, group, shared) or _conflict(group, cut, used, members)
        places = None if why else _places(axes, group, count, packed)
        if places is None:
            division.whole[name] = why or _indivisible(group, count)
            continue
        division.parts[name] = [b - a for a, b in itertools.pairwise(places)]
        alive[group.atom] = _between(group.size, places[number], places[number + 1])
        for atom, its in _read_by(axes, group.atom, alive[group.atom]).items():
            alive[atom] = alive[atom] | its if atom in alive else its
        summed |= dict.fromkeys(each.node for each in group.sites)
        used |= dict.fromkeys((each.weight.fqn for each in group.sites), group.atom)
        for fqn in cut:
            members.setdefault(fqn, set()).add(group.atom)
    if not division.parts:
        raise UsageError(
            f"nothing of this model can be divided among {count} processes",
            why="; ".join(f"{name}: {why}" for name, why in division.whole.items()) or "it has no heads and no FFN",
            hint="load it in one process, without tensor_parallel",
        )
    cuts = {node: [kept(axis, alive) for axis in axes.values[node.args[1]]] for node in packed}
    shrink(axes, alive, {})
    made = _in_their_formats(program, packed, cuts, summed)
    for node in summed:
        _add_up(program, made.get(node, node), is_first=number == 0)
    sweep(program)
    check(program, lowered=True)
    return program, division


def _why_whole(axes: Axes, group: Group, shared: list[Atom]) -> str | None:
    """Why the indices of an axis cannot be computed apart from each other; None where they can. shared: the heads of keys and
    values that they read."""
    if why := next((atom.pin for atom in (group.atom, *shared) if atom.pin), None):
        return why
    if group.products or any(atom in set(atoms(site.axis)) for site in axes.sites for atom in shared):
        return "values that are computed are multiplied along it"
    if not group.sites:
        return "no layer sums over it"
    others = {Call(each.node).name for each in group.sites if each.node.target not in PRODUCTS}
    return f"{', '.join(sorted(others))} sums over it, and linear layers alone are divided so" if others else None


def _conflict(group: Group, cut: set[str], used: dict[str, Atom], members: dict[str, set[Atom]]) -> str | None:
    """A weight is cut along one of its dimensions: what it gives is a sum over all processes, or a part of the result. cut: the
    weights that the group would cut; used: those that sum over an axis that is divided; members: all that are cut so far."""
    along = [each.weight.fqn for each in group.sites if members.get(each.weight.fqn, set()) - {group.atom}]
    across = [fqn for fqn in sorted(cut) if used.get(fqn, group.atom) is not group.atom]
    return f"{(along + across)[0]} is divided along its other dimension" if along or across else None


def _read_by(axes: Axes, atom: Atom, alive: Tensor) -> dict[Atom, Tensor]:
    """The heads of keys and values that those of the query heads `atom` read which are alive."""
    found: dict[Atom, Tensor] = {}
    for link in axes.links:
        if resolve(link.result) is atom:
            source = torch.zeros(link.source.size, dtype=torch.bool)
            source[link.index[alive]] = True
            for each in atoms(link.source):
                its = units_with(link.source, each, source)
                found[each] = found[each] | its if each in found else its
    return found


# ---------------------------------------------------------------------------------------------------------- where to cut


def _places(axes: Axes, group: Group, count: int, packed: dict[fx.Node, _Packed]) -> list[int] | None:
    """Where the indices of the group are cut, from 0 to its size, into parts as like as can be; None where there are not
    enough places."""
    free = torch.ones(group.size + 1, dtype=torch.bool)
    for link in axes.links:
        if resolve(link.result) is group.atom and len(link.index.unique()) >= count:
            free[1:-1] &= link.index[1:] != link.index[:-1]
    for each in group.sites:
        if each.node in packed:
            _forbid_within_groups(free, each.weight.axis, group.atom, packed[each.node])
    places = [0]
    for at in range(1, count):
        ahead = [place for place in free[:-1].nonzero().flatten().tolist() if place > places[-1]]
        ahead = ahead[: len(ahead) - (count - 1 - at)]
        if not ahead:
            return None
        places.append(min(ahead, key=lambda place: abs(place * count - at * group.size)))
    return [*places, group.size]


def _forbid_within_groups(free: Tensor, axis: Axis, atom: Atom, packed: _Packed) -> None:
    """No cut goes through numbers of a row that are packed together, in a byte or under a scale. free: [size + 1] bool."""
    along = units(axis, atom)
    for _, tensor in packed.parts.values():
        if tensor.ndim < max(each.ndim for _, each in packed.parts.values()):
            continue
        blocks = along.view(math.gcd(len(along), tensor.shape[-1]), -1)
        first, last = blocks.amin(1), blocks.amax(1)
        free[1:-1] &= not bool((first < last)[first < 0].any())
        ends = torch.zeros(len(free) + 1, dtype=torch.int64)
        ends.index_add_(0, first.clamp(min=0) + 1, torch.ones_like(first))
        ends.index_add_(0, last + 1, -torch.ones_like(last))
        free[1:-1] &= ends.cumsum(0)[1 : len(free) - 1] == 0


def _indivisible(group: Group, count: int) -> str:
    if group.size < count:
        return f"there are {group.size}, and {count} processes"
    return f"its {group.size} cannot be divided among {count} processes without cutting through a group of packed numbers"


def _between(size: int, first: int, last: int) -> Tensor:
    numbers = torch.arange(size)
    return (numbers >= first) & (numbers < last)


# -------------------------------------------------------------------------------------------------------- packed weights


def _in_floats(program: Program) -> dict[fx.Node, _Packed]:
    """Let every product with a packed weight be the float product that it stands for, with a weight that has a shape and no
    values, so that axes and removal see one kind of layer. Returns what each was."""
    packed: dict[fx.Node, _Packed] = {}
    names: dict[str, str] = {}
    for node in list(program.graph.nodes):
        product = product_of(node.target)
        if product is None or product.layer not in PRODUCTS:
            continue
        given = {argument.name: Call(node)[argument.name] for argument in node.target._schema.arguments}
        parts = {part: (name, program.constants[name]) for part, name in parts_of(node).items()}
        numbers, tensor = parts[scheme_of(node.target).numbers]
        value = given["x"].meta["val"]
        if numbers in names:
            weight = read(program, names[numbers], node)
        else:
            names[numbers] = free_name(program, f"{numbers}_whole")
            shape = (*tensor.shape[:-1], value.shape[-1])
            weight = constant(program, names[numbers], torch.empty(shape, dtype=value.dtype, device="meta"), node)
        last = given["offsets"] if product.layer is GROUPED_LINEAR else given["bias"]
        made = call(program, product.layer, (given["x"], weight, last), replacing=node, by=BY)
        packed[made] = _Packed(node.target, given, parts, node.meta.get("by", ""))
    sweep(program)
    return packed


def _in_their_formats(
    program: Program, packed: dict[fx.Node, _Packed], cuts: dict[fx.Node, list[Tensor]], summed: Container[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Undo `_in_floats`, with parts that are cut. cuts: of each weight [..., N, K], by dimension, what stays; summed: the
    products whose results are added up. Returns what stands in the place of each product."""
    made = {}
    for node, was in packed.items():
        given = was.given | {"x": node.args[0]}
        is_wider = node in summed and _rounds_by_row(was)
        if is_wider:
            given["x"] = insert(program, WITH_RANGE, (node.args[0],), before=node, by=BY, fqn=node.meta.get("fqn", ""))
        given |= {"offsets": node.args[2]} if node.target is GROUPED_LINEAR else {"bias": node.args[2]}
        for part, (name, tensor) in was.parts.items():
            if name in program.constants:  # of a weight that several read
                given[part] = read(program, name, node)
            else:
                cut = _cut(tensor, cuts[node])
                cut = _with_zeros(cut) if is_wider and cut.ndim == len(cuts[node]) else cut
                given[part] = constant(program, name, cut, node)
        args = tuple(given[argument.name] for argument in was.operator._schema.arguments)
        made[node] = call(program, was.operator, args, replacing=node, by=was.by)
    return made


def _rounds_by_row(packed: _Packed) -> bool:
    """Whether what a layer reads is rounded by the range of each row, and a number of the weight stands for itself alone."""
    product = product_of(packed.operator)
    wide = [tensor for _, tensor in packed.parts.values() if tensor.ndim == max(t.ndim for _, t in packed.parts.values())]
    return product.activations is not None and not product.learned and len(wide) == 1


def _with_zeros(numbers: Tensor) -> Tensor:
    """The columns of a weight under those that `with_range` adds."""
    zeros = torch.zeros(*numbers.shape[:-1], RANGE, dtype=numbers.dtype)
    # Nothing is joined of float8.
    kind = torch.uint8 if numbers.element_size() == 1 else numbers.dtype
    return torch.cat([numbers.view(kind), zeros.view(kind)], -1).view(numbers.dtype)


def _cut(tensor: Tensor, masks: list[Tensor]) -> Tensor:
    """Of a part of a weight [..., N, K] what belongs to the rows and the columns that stay. Where it has the dimensions of the
    weight, several numbers of a row may share one of the part, or one several."""
    cut = _select(tensor, len(masks) - 2, masks[-2])
    if tensor.ndim == len(masks):
        size = tensor.shape[-1]
        blocks = math.gcd(len(masks[-1]), size)
        cut = _select(cut, tensor.ndim - 1, masks[-1].view(blocks, -1)[:, 0].repeat_interleave(size // blocks))
    return cut.contiguous()


def _select(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    """What stays along a dimension; a view where that is in one piece."""
    index = mask.nonzero().flatten()
    if len(index) and len(index) == index[-1] - index[0] + 1:
        return tensor.narrow(dim, int(index[0]), len(index))
    if tensor.element_size() == 1:  # nothing is selected of float8
        return tensor.view(torch.uint8).index_select(dim, index).view(tensor.dtype)
    return tensor.index_select(dim, index)


def _add_up(program: Program, node: fx.Node, is_first: bool) -> None:
    """Let those who read the result of a layer read its sum over all processes. One of them adds the bias."""
    if not is_first and Call(node).get("bias") is not None:
        Call(node).set("bias", None)
    users = list(node.users)
    total = insert(program, ALL_REDUCE, (node,), before=node.next, by=BY, fqn=node.meta.get("fqn", ""))
    for user in users:
        user.replace_input_with(node, total)
