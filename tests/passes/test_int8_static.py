"""int8:mode=static as a pass: which layers, what it learns, what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxc
from fxc.calibrate.ranges import Range
from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.schemes import int8


class Mixed(nn.Module):
    """Convolutions written in two ways, a norm, layers that read one value, one that no sample reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.thin = nn.Conv2d(16, 4, 1)
        self.line = nn.Conv1d(16, 16, 3)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32, bias=False)
        self.constant = nn.Linear(16, 16)
        self.register_buffer("ones", torch.ones(1, 16))

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        thin = self.thin(x)
        x = self.line(x.flatten(2)).mean(2)
        return self.a(x) * self.b(x), thin, x + self.constant(self.ones)


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    calib = [torch.randn(2, 3, 8, 8) for _ in range(6)]
    return fxc.optimize(Mixed().eval(), (calib[0],), "int8:mode=static:observer=minmax", calib=calib), calib


def test_it_packs_convolutions_and_linear_layers_and_says_what_stays(compiled):
    model, _ = compiled
    step = model.report["passes"][-1]
    packed = {node.meta["fqn"]: node for node in model.program.graph.nodes if node.target in (int8.STATIC, int8.STATIC_CONV2D)}
    assert packed.keys() == {"conv", "a", "b"}, "the norm went into its convolution"
    shapes = {name: list(model.program.constants[f"conv.{name}"].shape) for name in ("qweight", "scale", "bias")}
    assert shapes == {"qweight": [16, 3, 3, 3], "scale": [16], "bias": [16]}
    reasons = {each["fqn"]: each["reason"] for each in step["refusals"]}
    assert reasons["thin"].startswith("it has only 4 outputs") and reasons["constant"].startswith("no sample reached it")
    assert "a convolution (aten.conv1d" in reasons["line"]
    assert "the largest errors of inputs" in step["notes"][0]
    # Layers that read one value round it alike, and are one product when they are lowered.
    assert len({(Call(packed[name])["x_scale"], Call(packed[name])["x_zero"]) for name in "ab"}) == 1


def test_the_scale_of_the_first_layer_is_that_of_the_data(compiled):
    model, calib = compiled
    [node] = [node for node in model.program.graph.nodes if node.meta.get("fqn") == "conv"]
    seen = Range()
    for x in calib:
        seen.add(x)
    assert (Call(node)["x_scale"], Call(node)["x_zero"]) == seen.scale_and_zero("minmax")


def test_it_says_what_lies_beyond_the_learned_range():
    torch.manual_seed(0)
    model, calib = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).eval(), [torch.randn(1000, 32)]
    calib[0][::100] *= 5
    told = {}
    for observer in ("minmax", "percentile"):
        made = fxc.optimize(model, (calib[0],), f"int8:mode=static:smooth=false:observer={observer}", calib=calib)
        told[observer] = made.report["passes"][-1]["cut_off"]
        [node] = [node for node in made.program.graph.nodes if node.meta.get("fqn") == "0"]
        scale, zero = Call(node)["x_scale"], Call(node)["x_zero"]
        q = (calib[0].double() / scale).round() + zero
        beyond = ((q < 0) | (q > 255)).double().mean().item()
        assert told[observer]["0"] == pytest.approx(beyond, abs=2e-5)
    assert told["minmax"] == {"0": 0.0, "2": 0.0} and 5e-5 < told["percentile"]["0"] < 2e-4


def test_it_is_the_same_when_it_is_loaded(compiled, tmp_path):
    model, calib = compiled
    model.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    assert str(loaded.program) == str(model.program)
    for a, b in zip(loaded(calib[0]), model(calib[0])):
        torch.testing.assert_close(a, b)


def test_data_is_needed():
    with pytest.raises(UsageError, match="mode=static is measured on calibration data"):
        fxc.optimize(nn.Linear(32, 32), (torch.randn(2, 32),), "int8:mode=static")


def test_dynamic_int8_leaves_convolutions_and_norms_as_they_were():
    torch.manual_seed(0)
    made = fxc.optimize(Mixed().eval(), (torch.randn(2, 3, 8, 8),), "int8")
    assert {"conv.weight", "norm.running_mean"} <= made.program.constants.keys()
    assert "fold_batch_norm" not in [step["name"] for step in made.report["passes"]]
