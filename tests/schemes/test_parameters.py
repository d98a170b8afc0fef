"""A packed weight counts as the numbers that it stands for, whatever holds them."""

import pytest
import torch
from families import build
from torch import nn

import fxc
from fxc.schemes.parameters import parameters, parameters_by_constant
from fxc.schemes.scheme import scheme_of

PASSES = [
    "fp8", "int4", "int4:bits=3", "int4:bits=2:group=32:symmetric=false", "int8", "int8:mode=static", "int8:embeddings=int4",
    "sparse24", "sparse24,int8", "sparse24,int4",
]  # fmt: skip


class Net(nn.Module):
    """A table, a convolution, layers of which two have one weight."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(64, 128), nn.Conv2d(128, 128, 3, padding=1)
        self.up, self.tied = nn.Linear(128, 256), nn.Linear(128, 256, bias=False)
        self.tied.weight = self.up.weight

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
        return self.up(x), self.tied(x)


def made(passes: str) -> fxc.Program:
    ids = torch.arange(20).reshape(2, 10)
    calib = [{"ids": ids}] if "static" in passes else None
    return fxc.optimize(Net().eval(), (ids,), passes=passes, calib=calib, verify=False, allow_noop=True).program


def test_of_a_model_that_is_not_packed_they_are_its_own():
    program = made("")
    assert parameters(program) == program.numel() == sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize("passes", PASSES)
def test_packing_changes_nothing(passes):
    program = made(passes)
    assert any(scheme_of(node.target) for node in program.graph.nodes)
    assert parameters(program) == sum(p.numel() for p in Net().parameters())
    assert parameters_by_constant(program).keys() == program.constants.keys()


def test_of_experts_too():
    program = fxc.optimize(build("mixtral")[0], passes="int4:group=32", verify=False).program
    assert parameters(program) == parameters(fxc.optimize(build("mixtral")[0], passes="", verify=False).program)
    assert parameters(program) > program.numel()


def test_the_report_counts_so_before_and_after():
    report = fxc.optimize(Net().eval(), (torch.arange(20).reshape(2, 10),), passes="int4", verify=False).report
    assert report["parameters_before"] == report["parameters_after"] == report["passes"][-1]["parameters_after"]
