"""Small networks to prune, and what a policy did to them."""

from __future__ import annotations

import functools

import torch
from removal import Attention, canonical
from torch import Tensor, nn

from fxc.ir.program import Program
from fxc.passes.base import Context, Result, parse_passes

gelu = torch.nn.functional.gelu


def masked(program: Program, spec: str, data: list | None = None, skip: tuple[str, ...] = ()) -> tuple[Program, Result]:
    after = program.copy()
    (step,) = parse_passes(spec)
    return after, step.run(after, Context(samples=data or [], skip=skip))


def counts(result: Result) -> dict[str, tuple[int, int]]:
    return {r.scope: (r.before, r.removed) for r in result.removed}


def zero_columns(weight: Tensor) -> list[int]:
    return (~weight.any(0)).nonzero().flatten().tolist()


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(gelu(self.up(x)))


DATA = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Stack(nn.Module):
    """Numbered residual layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nn.Module):
    def __init__(self, hidden: int = 40, scale: float = 1.0):
        super().__init__()
        self.up, self.down = nn.Linear(10, hidden), nn.Linear(hidden, 10)
        with torch.no_grad():
            self.down.weight *= scale
            self.down.bias *= scale

    def forward(self, x):
        return x + self.down(gelu(self.up(x)))


def stack(*layers) -> Program:
    return canonical(Stack(layers), (torch.randn(2, 5, 10),))


@functools.cache
def three_layers() -> Program:
    torch.manual_seed(4)
    return stack(Residual(40), Residual(40, 0.1), Residual(40, 3.0))


class Repeated(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.float()
