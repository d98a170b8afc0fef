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
from fxc.analysis.constants import Known
from fxc.analysis.dims import Axes, Site
from fxc.analysis.operators import operator_of
from fxc.ir.call import Call


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
        dead = _dead_positions(site, known, found)
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


def _dead_positions(site: Site, known: dict[fx.Node, Known], found: Liveness) -> Tensor:
    """[size of the site's axis] bool: where its contribution is known."""
    rule = operator_of(site.node.target).dead
    if rule is None:
        return torch.zeros(site.axis.size, dtype=torch.bool)
    dead = rule(site, Call(site.node), known)
    if dead.fold is not None:
        found.folds[site.node] = dead.fold
    if dead.kept is not None:
        found.kept.append((site.node, dead.kept))
    return dead.positions
