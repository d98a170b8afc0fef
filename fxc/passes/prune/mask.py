"""Mask units of a group: zero every weight that reads them, which is all that a pruning policy does to a program."""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.analysis.groups import Group
from fxc.ir.program import Program


def mask(program: Program, group: Group, units: Tensor) -> None:
    """Zero, wherever the group is summed over, the weights of `units` [n] int64. The constants are replaced, not written to."""
    for weight in dict.fromkeys(site.weight for site in group.sites):
        positions = torch.isin(weight.units, units).nonzero().flatten()
        tensor = program.constants[weight.fqn]
        program.constants[weight.fqn] = tensor.index_fill(weight.dim, positions, 0)


def unmaskable(group: Group) -> str | None:
    """Why units of `group` cannot be masked, or None."""
    if group.pinned:
        return group.pinned
    if not group.sites:
        return "no weight reads it"
    return "it is also multiplied by a value that is computed" if group.products else None
