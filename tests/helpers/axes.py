"""Programs in whose axes tests look."""

from __future__ import annotations

import functools

from families import build
from torch import nn

import fxc.passes
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes


def canonical(model: nn.Module, example: tuple | None = None) -> Program:
    program = fxc.capture(model.eval(), example, check=False)
    return run_passes(program, Context(), Options("canonicalize", verify=False))[0]


def members(group) -> set[str]:
    inside = f"{group.scope}." if group.scope else ""
    return {f"{m.fqn.removeprefix(inside)}:{m.dim}" for m in group.members}


@functools.cache
def family(name: str):
    return canonical(*build(name))


def toy(forward, **modules) -> nn.Module:
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x):
            return forward(self, x)

    return Toy()


def group_of(found, fqn: str, dim: int):
    """The largest group that runs along that dimension."""
    return max((g for g in found if (fqn, dim) in {(m.fqn, m.dim) for m in g.members}), key=lambda g: g.size)
