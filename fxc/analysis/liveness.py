"""Which indices of which axes do not matter: no one reads them, or what is read there is the same number every time.

An index of an atom is dead when at every place that sums over it its contribution is known without running the program: the
weights that multiply it are zero, or the value there is a constant, which can be added to the bias of the consumer instead.
An index that others are copied from is dead when all of its copies are. Dead indices may all be removed together, because each
was found dead while all the others were there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxc.analysis.axis import DYNAMIC, Atom, Axis, atoms, resolve, units
from fxc.analysis.known import Known, pads
from fxc.analysis.rules import Axes, Site
from fxc.schemes import ops

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding,
)  # fmt: skip
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass
class Liveness:
    """dead: atom -> [size] bool, for atoms of which some index is dead; folds: consumer -> [positions along the axis that it
    sums over, float64], what stands there where it is a constant other than zero; kept: of indices that are constant and stay
    nevertheless, the consumer and why."""

    dead: dict[Atom, Tensor] = field(default_factory=dict)
    folds: dict[fx.Node, Tensor] = field(default_factory=dict)
    kept: list[tuple[fx.Node, str]] = field(default_factory=list)


def liveness(axes: Axes, known: dict[fx.Node, Known]) -> Liveness:
    found = Liveness()
    alive: dict[Atom, Tensor] = {}
    for site in axes.sites:
        if site.axis is DYNAMIC or all(a.pin for a in atoms(site.axis)):
            continue
        dead = _dead_positions(site, axes, known, found)
        for atom in dict.fromkeys(atoms(site.axis)):
            if not atom.pin:
                its = units_with(site.axis, atom, ~dead)
                alive[atom] = alive[atom] | its if atom in alive else its
    _follow_links(axes, alive)
    found.dead = {atom: ~its for atom, its in alive.items() if not its.all()}
    return found


def units_with(axis: Axis, atom: Atom, positions: Tensor) -> Tensor:
    """[atom.size] bool: the units that have one of `positions` ([axis.size] bool)."""
    along = units(axis, atom)
    result = torch.zeros(atom.size, dtype=torch.bool)
    result[along[positions & (along >= 0)]] = True
    return result


def _follow_links(axes: Axes, alive: dict[Atom, Tensor]) -> None:
    """What is copied lives as long as a copy of it does. A copy of a copy takes another round, and where the copies are of
    the axis itself every index may."""
    for _ in range(1 + len(axes.links) + max((link.source.size for link in axes.links), default=0)):
        before = {atom: its.clone() for atom, its in alive.items()}
        readers: dict[Atom, Tensor] = {}
        for link in axes.links:
            result = resolve(link.result)
            its = alive.get(result) if isinstance(result, Atom) else None
            read = torch.zeros(link.source.size, dtype=torch.bool)
            read[link.index if its is None else link.index[its]] = True
            for atom in dict.fromkeys(atoms(link.source)):
                if not atom.pin:
                    used = units_with(link.source, atom, read)
                    readers[atom] = readers[atom] | used if atom in readers else used
        for atom, used in readers.items():
            alive[atom] = _own(axes, alive, atom) | used
        if before.keys() == alive.keys() and all(torch.equal(before[a], alive[a]) for a in alive):
            return


def _own(axes: Axes, alive: dict[Atom, Tensor], atom: Atom) -> Tensor:
    """What is alive of a link's source because of sites of its own."""
    has_sites = any(atom in set(atoms(site.axis)) for site in axes.sites if site.axis is not DYNAMIC)
    return alive[atom] if has_sites else torch.zeros(atom.size, dtype=torch.bool)


def _dead_positions(site: Site, axes: Axes, known: dict[fx.Node, Known], found: Liveness) -> Tensor:
    """[size of the site's axis] bool: where its contribution is known."""
    node = site.node
    if node.target is aten.linear.default:
        return _dead_of_linear(site, known, found)
    if node.target in CONVOLUTIONS:
        return _dead_of_convolution(site, known, found)
    if node.target in TRANSPOSED:
        return _dead_of_transposed(site, known)
    if node.target is ops.GROUPED_LINEAR:
        return _dead_of_experts(site, known)
    if node.target is aten.scaled_dot_product_attention.default:
        key = _vanishes(node, 1, -1, known)
        heads = node.meta["val"].shape[-3] if node.meta["val"].ndim > 2 else 1
        if key is not None and key.ndim > 1 and 1 < key.shape[-2] < heads:
            key = key.repeat_interleave(heads // key.shape[-2], -2)
        return _either(site, _vanishes(node, 0, -1, known), key)
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _either(site, _vanishes(node, 0, -1, known), _vanishes(node, 1, -2, known))
    return torch.zeros(site.axis.size, dtype=torch.bool)


def _vanishes(node: fx.Node, operand: int, dim: int, known: dict[fx.Node, Known]) -> Tensor | None:
    """[batch dimensions, size]: where along dimension `dim` (-1 or -2) the operand is zero all along the other of the two."""
    argument = node.args[operand]
    if (k := known.get(argument)) is None:
        return None
    zero = k.zeros()
    zero = zero.all(-2 if dim == -1 else -1)
    size = argument.meta["val"].shape[dim]
    return zero if zero.shape[-1] == size else zero.expand(*zero.shape[:-1], size)


def _either(site: Site, a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None and b is None:
        return torch.zeros(site.axis.size, dtype=torch.bool)
    either = b if a is None else a if b is None else a | b
    return either.reshape(-1, site.axis.size).all(0)


def _constant_along(known: Known | None, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """(mask, values float64) [size]: where along `dim` the value is the same number at all positions."""
    if known is None:
        return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)
    values = known.values.movedim(dim, -1).reshape(-1, known.values.shape[dim])
    mask = known.mask.movedim(dim, -1).reshape(-1, known.values.shape[dim])
    mask = (mask & (values == values[:1])).all(0)
    return mask.expand(size), torch.where(mask, values[0], 0).double().expand(size)


def _dead_of_linear(site: Site, known: dict[fx.Node, Known], found: Liveness) -> Tensor:
    node, size = site.node, site.axis.size
    weight = known.get(node.args[1])
    if weight is None or not weight.is_complete:
        mask, values = _constant_along(known.get(node.args[0]), -1, size)
        return mask & (values == 0)
    unread = ~weight.values.expand(node.args[1].meta["val"].shape).any(0)
    mask, values = _constant_along(known.get(node.args[0]), -1, size)
    if bool((mask & ~unread & (values != 0)).any()):
        bias = node.args[2] if len(node.args) > 2 else None
        if node.args[1].op != "get_attr" or not (bias is None or bias.op == "get_attr"):
            found.kept.append((node, "it reads constants, and its weight or bias is computed while the model runs"))
            mask = mask & (values == 0)
        else:
            found.folds[node] = torch.where(unread, 0, values)
    return unread | mask


def _dead_of_convolution(site: Site, known: dict[fx.Node, Known], found: Liveness) -> Tensor:
    node = site.node
    weight, kernel = known.get(node.args[1]), node.args[1].meta["val"]
    outputs, inner = kernel.shape[:2]
    groups = node.args[6] if len(node.args) > 6 else 1
    mask, values = _constant_along(known.get(node.args[0]), 1, groups * inner)
    mask, values = mask.reshape(groups, inner), values.reshape(groups, inner)
    if weight is None or not weight.is_complete:
        return (mask & (values == 0)).all(0)
    unread = ~weight.values.expand(kernel.shape).reshape(groups, outputs // groups, inner, -1).any(3).any(1)
    constant = mask & ~unread & (values != 0)
    bias = node.args[2] if len(node.args) > 2 else None
    if constant.any():
        reason = None
        if pads(node):
            reason = "it reads constants and pads with zeros, so that they are not constant at the border"
        elif node.args[1].op != "get_attr" or not (bias is None or bias.op == "get_attr"):
            reason = "it reads constants, and its weight or bias is computed while the model runs"
        if reason:
            found.kept.append((node, reason))
            mask = mask & (values == 0)
        else:
            found.folds[node] = torch.where(unread, 0, values)
    return (unread | mask).all(0)


def _dead_of_transposed(site: Site, known: dict[fx.Node, Known]) -> Tensor:
    """At the border fewer terms are added up, so that only zeros go."""
    node, size = site.node, site.axis.size
    mask, values = _constant_along(known.get(node.args[0]), 1, size)
    weight = known.get(node.args[1])
    unread = torch.zeros(size, dtype=torch.bool)
    if weight is not None and weight.is_complete:
        unread = ~weight.values.expand(node.args[1].meta["val"].shape).flatten(1).any(1)
    return unread | (mask & (values == 0))


def _dead_of_experts(site: Site, known: dict[fx.Node, Known]) -> Tensor:
    """Experts have no bias, so that only zeros go."""
    node, size = site.node, site.axis.size
    mask, values = _constant_along(known.get(node.args[0]), -1, size)
    weight = known.get(node.args[1])
    unread = torch.zeros(size, dtype=torch.bool)
    if weight is not None and weight.is_complete:
        unread = ~weight.values.expand(node.args[1].meta["val"].shape).any(1).any(0)
    return unread | (mask & (values == 0))
