"""What every algorithm that learns a weight has to stand: in each format, through the pass."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from fxc.calibrate.quantize import STATISTICS
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes


class Twice(nn.Module):
    """A layer that runs twice, in one block."""

    def __init__(self):
        super().__init__()
        self.same, self.last = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.last(torch.relu(self.same(torch.relu(self.same(x)))))


class Tied(nn.Module):
    """Two layers of one weight, in different blocks, and one between."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.second = (nn.Linear(64, 64) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        x = x + torch.relu(self.first(x))
        x = x + torch.relu(self.other(x))
        return x + torch.relu(self.second(x))


def inputs(count=4, rows=30, dead=0, rank=64):
    made = torch.Generator().manual_seed(1)
    mix = torch.randn(rank, 64, generator=made)
    mix[:, :dead] = 0
    return [[torch.randn(rows, rank, generator=made) @ mix] for _ in range(count)]


CASES = {
    "plain": inputs(),
    "dead inputs": inputs(dead=40),
    "all dead": inputs(dead=64),
    "rank-deficient": inputs(rank=5),
    "one sample": inputs(1),
    "one row": inputs(1, 1),
}


@cache
def captured(model):
    torch.manual_seed(0)
    return capture(model(), (torch.randn(3, 64),), check=False)


def packed(model, spec, samples):
    program = captured(model)
    after, steps = run_passes(program, Context(samples=samples), Options(spec, verify=False))
    return program, after, steps[-1]


PLACES = [(Twice, case, "int4:group=32") for case in CASES]
PLACES += [(model, "plain", format) for model, format in ((Tied, "int4:group=32"), (Twice, "int8"), (Tied, "int8"))]


@pytest.mark.parametrize("algorithm", STATISTICS)
@pytest.mark.parametrize(("model", "case", "format"), PLACES)
def test_hard_cases(model, case, format, algorithm):
    program, after, step = packed(model, f"{format}:algorithm={algorithm}", CASES[case])
    assert step.changed == 3 and not any(name.endswith(".weight") for name in after.constants)
    assert sum(name.endswith("qweight") for name in after.constants) == 2, "a weight that is read twice is packed once"
    assert all(tensor.isfinite().all() for tensor in after.constants.values() if tensor.is_floating_point())
    for [x] in CASES[case]:
        [expected], [given] = program.module()(x), after.module()(x)
        # Of 16 levels; what a wrongly packed weight gives is as large as the output.
        assert (given - expected).norm() < 0.25 * expected.norm()


def test_a_tied_weight_is_not_trained_for_one_of_its_places():
    notes = packed(Tied, "int4:group=32:algorithm=round", CASES["plain"])[2].notes
    [note] = [each for each in notes if "rounding learned" in each]
    # Of three blocks one has a weight of its own.
    assert "of 1 blocks" in note
