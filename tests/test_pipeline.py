"""A run of passes: every gate can fail, and a run that changes nothing is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import Mlp
from torch import nn

import fxc
from fxc.errors import UsageError, VerificationFailed
from fxc.ir import print_program
from fxc.ir.edit import call
from fxc.options import Options
from fxc.passes.base import Context, Fact, Pass, Result
from fxc.passes.facts import CANONICAL
from fxc.pipeline import run_passes


@pytest.mark.fault(5)
def test_a_pass_that_does_nothing_is_an_error_with_the_reasons():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    with pytest.raises(UsageError, match="changed nothing") as caught:
        run_passes(program, Context(skip=("*",)), Options("int8"))
    assert "skipped by the pattern" in str(caught.value)
    assert run_passes(program, Context(skip=("*",)), Options("int8", allow_noop=True))[1][-1].changed == 0


@dataclass(frozen=True)
class Spoil(Pass):
    """A pass that does something wrong, of a chosen kind."""

    how: str = "meaning"
    is_policy: ClassVar[bool] = False
    gives: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, program, context):
        node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)[0]
        if self.how == "meaning":
            call(program, torch.ops.aten.relu.default, node.args, replacing=node, by="spoil")
            program.graph.erase_node(node)
        elif self.how == "finite":
            program.constants["up.weight"] = program.constants["up.weight"] * float("nan")
        elif self.how == "orphan":
            program.constants["orphan"] = torch.zeros(2)
        elif self.how == "shape":
            program.constants["up.weight"] = torch.zeros(95, 40)
        elif self.how == "crash":
            raise ZeroDivisionError("oops")
        return Result(1)


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("meaning", "may not change what the program computes"),
        ("finite", "NaN or infinite"),
        ("orphan", "nothing reads it"),
        ("shape", "the graph says"),
        ("crash", "broke off"),
    ],
)
def test_every_gate_can_fail(how, says):
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    text = print_program(program)
    spoil = Spoil(how)
    object.__setattr__(spoil, "name", "spoil")
    with pytest.raises(VerificationFailed) as caught:
        run_passes(program, Context(), Options([spoil]))
    assert says in str(caught.value)
    assert print_program(program) == text, "a failed pass must leave its input as it was"


def test_a_broken_promise_is_found():
    class Liar(Spoil):
        gives = frozenset({CANONICAL})

        def run(self, program, context):
            return Result(0)

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.weight

    program = fxc.capture(Product(), (torch.randn(2, 8),))
    with pytest.raises(VerificationFailed, match="promises canonical"):
        run_passes(program, Context(), Options([Liar()]))


def test_a_budget_can_be_exceeded_and_names_the_layer():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    with pytest.raises(VerificationFailed, match="the budget is 1e-06") as caught:
        run_passes(program, Context(), Options("int8", budget=1e-6))
    assert any(f" {layer}:" in str(caught.value) for layer in ("up", "down", "head"))
