"""A packed layer is judged by itself, in parts that take little memory."""

import pytest
import torch
from torch import nn

from fxc.errors import VerificationFailed
from fxc.frontend.capture import capture
from fxc.passes.base import Context, parse_passes
from fxc.schemes import int4
from fxc.verify import layer_gate
from fxc.verify.layer_gate import LayerGate


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.conv = nn.Linear(64, 40), nn.Conv2d(4, 16, 3)

    def forward(self, x):
        return self.conv(self.up(x)[:, None, :, :].expand(-1, 4, -1, -1))


def judged(spec, limit=1.0, damaged=False):
    """The gate after the pass `spec` has gone over the model; damaged: what it packed is changed before it is judged."""
    program, step = capture(Mixed(), (torch.randn(2, 9, 64),)), parse_passes(spec)[0]
    gate = LayerGate(step, limit)

    def on_layer(after, layer, weight, made):
        if damaged:
            numbers = next(after.constants[name] for name in after.constants if name.endswith("qweight"))
            numbers[0] = 0
        gate(after, layer, weight, made)

    step.run(program, Context(on_layer=on_layer))
    return gate


def test_the_error_is_that_of_the_layer_on_drawn_rows():
    gate, layer = judged("int4:group=32"), Mixed().up
    rows = torch.randn(layer_gate.ROWS, 64, generator=torch.Generator().manual_seed(0))
    rounded = int4.SCHEME.fake(layer.weight.detach(), group=32, symmetric=True, full_range=True)
    expected = layer(rows).detach()
    error = ((rows @ rounded.T + layer.bias.detach()) - expected).norm() / expected.norm()
    assert gate.errors == {"up": pytest.approx(float(error), rel=1e-4)}
    assert "1, each on drawn rows" in gate.outcome() and torch.is_grad_enabled()


def test_parts_of_a_layer_add_up_to_it(monkeypatch):
    whole = judged("int8")
    monkeypatch.setattr(layer_gate, "_AT_ONCE", 64 * 7)
    assert judged("int8").errors == {name: pytest.approx(error, rel=1e-5) for name, error in whole.errors.items()}


def test_a_damaged_weight_is_named():
    with pytest.raises(VerificationFailed, match="alone it differs by") as failed:
        judged("int4:group=32", limit=0.15, damaged=True)
    assert failed.value.where == "up"


def test_a_pass_that_packs_nothing_was_not_measured():
    assert judged("int4:group=32:only=conv").outcome() == "not measured: no layer was packed"
