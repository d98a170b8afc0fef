"""Watching a program run."""

import torch
from families import Mlp

import fxc
from fxc.ir.observe import observe, values_at


def test_values_outputs_and_replacement():
    model, x = Mlp(), torch.randn(2, 40)
    program = fxc.capture(model, (x,))
    module = program.module()
    last = program.results[0].name
    first = next(n.name for n in program.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        (expected,) = module(x)
        assert torch.equal(values_at(module, [x], {last})[last], expected)
        seen = []
        (same,) = observe(module, [x], {first: lambda value: seen.append(value)})
        assert torch.equal(same, expected) and len(seen) == 1
        (other,) = observe(module, [x], {first: torch.zeros_like})
    assert not torch.equal(other, expected)
    values = values_at(module, [x], {first, last})
    assert set(values) == {first, last}


def test_gradients_reach_a_watched_value():
    x = torch.randn(2, 40, requires_grad=True)
    program = fxc.capture(Mlp(), (x.detach(),))
    first = next(n.name for n in program.graph.nodes if n.op == "call_function")
    kept = {}
    (out,) = observe(program.module(), [x], {first: lambda value: kept.update(value=value)})
    (gradient,) = torch.autograd.grad(out.sum(), [kept["value"]])
    assert gradient.shape == kept["value"].shape and gradient.abs().sum() > 0
