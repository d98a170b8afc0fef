"""Random matrices, and a small network in every format."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fxc
from fxc.ir import print_program
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.schemes import sparse24

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECS = [
    "int4:group=32", "int4:group=32:symmetric=false", "int4:bits=3:group=32", "int4:bits=2:group=32", "fp8",
    "fp8:mode=weight_only", "sparse24", "sparse24,int8",
    "sparse24,int4:group=32", "sparse24,int4:group=32:symmetric=false",
]  # fmt: skip
seeds = st.integers(0, 2**16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def sparse(rows: int, columns: int, seed: int, share: float = 1.0) -> Tensor:
    """A 2:4 matrix, of whose two in four only `share` are not zero."""
    matrix = sparse24.mask_by_magnitude(normal(rows, columns, seed=seed))
    return matrix * (torch.rand(rows, columns, generator=generator(seed + 1)) < share)


class Net(nn.Module):
    """q, k and v read one activation; `up` has 64 columns, `down` 96, `odd` 36, `head` too few outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, 32, bias=bias) for bias in (True, False, True))
        self.up, self.down, self.odd = nn.Linear(32, 96), nn.Linear(96, 36), nn.Linear(36, 32, bias=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        hidden = torch.nn.functional.gelu(self.q(x) * self.k(x) + self.v(x))
        return self.head(self.odd(self.down(torch.relu(self.up(hidden)))))


@cache
def captured(dtype: torch.dtype = torch.float32):
    return fxc.capture(Net().to(dtype).eval(), (normal(3, 5, 64, dtype=dtype),), check=False)


@cache
def compiled(spec: str, dtype: torch.dtype = torch.float32):
    return run_passes(captured(dtype), Context(), Options(spec))


def directed(count: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Inputs of `Net` of few directions, as what layers of models read has."""
    mix = normal(12, 64, seed=3)
    return [[(normal(3, 5, 12, seed=seed + at) @ mix).to(dtype)] for at in range(count)]


def learned(spec: str, dtype: torch.dtype = torch.float32, calibration: list[list[Tensor]] | None = None):
    """`compiled`, of calibration data."""
    data = directed(16, dtype=dtype) if calibration is None else calibration
    return run_passes(captured(dtype), Context(samples=data), Options(spec))


def error(program, dtype: torch.dtype = torch.float32) -> float:
    """Of the outputs of `program`, made from `Net`, on inputs like `directed` ones but others."""
    gap = whole = 0.0
    for x in directed(8, seed=99, dtype=dtype):
        expected = captured(dtype).module()(*x)[0].double()
        gap += (program.module()(*x)[0] - expected).square().sum().item()
        whole += expected.square().sum().item()
    return (gap / whole) ** 0.5


def targets(program) -> dict[str, int]:
    lines = print_program(program).splitlines()
    calls = [line.split(" = ")[1].partition("(")[0] for line in lines if line.startswith("%") and " = fxc." in line]
    return {name: calls.count(name) for name in calls}


def refusals(steps) -> dict[str, str]:
    return {r.fqn: r.reason for r in steps[-1].refusals}
