"""int8: what is packed, under which names, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from families import Mlp
from programs import body
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.facts import FLOAT_WEIGHTS
from fxc.pipeline import run_passes


@pytest.mark.fault(10)
def test_quantizing_twice_is_refused():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    small, _ = run_passes(program, Context(), Options("int8"))
    with pytest.raises(UsageError, match="is a quantized weight"):
        run_passes(small, Context(), Options("int8"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.body(self.embed(ids))))


@pytest.mark.fault(1)
def test_tied_weights_are_one_constant_and_left_alone():
    program = fxc.capture(Tied(), (torch.randint(0, 50, (2, 7)),))
    assert program.aliases == {"head.weight": "embed.weight"}
    small, steps = run_passes(program, Context(), Options("int8"))
    assert [(r.fqn, "tied" in r.reason) for r in steps[-1].refusals] == [("embed", True)]
    assert body(small).count("@body.qweight") == 2, "a layer that is called twice is packed once"
    assert small.aliases == program.aliases


@pytest.mark.parametrize(("pattern", "left"), [("up", {"up"}), ("re:^(up|down)$", {"up", "down"})])
def test_skip_leaves_layers_alone_and_says_so(pattern, left):
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    program.constants["head.weight"] = torch.randn(10, 40)
    small, steps = run_passes(program, Context(skip=(pattern,)), Options("int8", allow_noop=True))
    assert {r.fqn for r in steps[-1].refusals if "pattern" in r.reason} == left
    assert all(f"{fqn}.weight" in small.constants for fqn in left)


class Scaled(nn.Module):
    """A linear layer that has names of its own where int8 wants to put its constants."""

    def __init__(self, names):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        for name in names:
            inner = nn.Module() if "." in name else self
            if "." in name:
                self.add_module(name.partition(".")[0], inner)
            inner.register_parameter(name.rpartition(".")[2], nn.Parameter(-torch.rand(32)))

    def forward(self, x):
        factors = [p for n, p in self.named_parameters() if n != "weight"]
        return torch.nn.functional.linear(x, self.weight) * sum(factors)


@pytest.mark.parametrize(
    ("names", "made"),
    [
        ([], {"a.qweight", "a.scale"}),
        (["scale"], {"a.qweight", "a.int8.scale"}),
        (["qweight"], {"a.int8.qweight", "a.scale"}),
        (["scale.gain", "qweight"], {"a.int8.qweight", "a.int8.scale"}),
        (["scale", "int8"], {"a.qweight", "a.int8_2.scale"}),
    ],
)
def test_packed_weights_take_free_names(names, made):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Scaled(names)

        def forward(self, x):
            return self.a(x) + 1

    program = fxc.capture(Around(), (torch.randn(3, 32),))
    own = {f"a.{name}" for name in names}
    small, _ = run_passes(program, Context(), Options("int8"))
    assert set(small.constants) == made | own
    assert all(torch.equal(small.constants[n], program.constants[n]) for n in own)
    small.module()(torch.randn(3, 32))


def test_a_parameter_that_is_called_qweight_is_not_a_packed_weight():
    program = fxc.capture(Scaled(["qweight"]), (torch.randn(3, 32),))
    assert FLOAT_WEIGHTS.check(program) is None
    assert "is a quantized weight" in FLOAT_WEIGHTS.check(run_passes(program, Context(), Options("int8"))[0])


def test_a_weight_multiplied_by_itself_is_refused():
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return x + torch.nn.functional.linear(self.w, self.w)

    program = fxc.capture(Gram(), (torch.randn(32, 32),), check=False)
    _, steps = run_passes(program, Context(), Options("int8", allow_noop=True))
    assert steps[-1].changed == 0 and "tied" in steps[-1].refusals[0].reason
