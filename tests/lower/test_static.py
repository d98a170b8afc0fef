"""Static int8 on a CPU: convolutions, and chains that stay int8."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxc
from fxc.lower.choose import compressed
from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable
from fxc.schemes import int8
from fxc_kernels.cpu import int8_static, ops

pytestmark = pytest.mark.skipif(not int8_static.conv2d_is_exact(), reason="int8 products saturate on this CPU")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class Residual(nn.Module):
    """A stem with a pool, residual blocks, an inverted bottleneck, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1))
        self.wide = nn.Conv2d(64, 64, 3, 1, 1, groups=64)
        self.narrow = nn.Conv2d(64, 32, 1, bias=False)
        self.head = nn.Linear(512, 32)

    def forward(self, x):
        x = self.blocks(F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1))
        x = self.narrow(F.relu6(self.wide(x)))
        return self.head(x.flatten(1)), x.mean((2, 3))


class Plain(nn.Module):
    """No residual sums: what is lowered is what the program says, but for the order of float sums."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 2, dilation=2, groups=4), nn.Hardswish(),
            nn.Conv2d(16, 32, (3, 1), padding=(1, 0)), nn.MaxPool2d(4), nn.ReLU(),
        )  # fmt: skip
        self.linears = nn.Sequential(nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.SiLU())

    def forward(self, x):
        return self.linears(self.convs(x).flatten(1))


def made(model: nn.Module, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = model().eval().to(dtype)
    torch.manual_seed(1)
    calib = [torch.randn(4, 3, 32, 32).to(dtype) for _ in range(4)]
    return model, fxc.optimize(model, (torch.randn(2, 3, 32, 32).to(dtype),), "int8:mode=static", calib=calib)


def lowered_of(program, backend: str = "eager"):
    lowered, report = lower_cpu(program, backend, measure=compressed)
    return lowered, report, runnable(lowered, "cpu", backend)


def dtypes(program, target) -> list[torch.dtype]:
    return [node.meta["val"].dtype for node in program.graph.find_nodes(op="call_function", target=target)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_residual_network_stays_int8(backend):
    model, compiled = made(Residual)
    lowered, report, run = lowered_of(compiled.program, backend)
    found = lowered.graph.find_nodes(op="call_function", target=ops.STATIC_CONV2D)
    convolutions = {node.meta["fqn"]: node.meta["val"].dtype for node in found}
    # A sum of two results that nobody reads as levels is one of floats; what the mean reads is float.
    floats = {name for name, dtype in convolutions.items() if dtype == torch.float32}
    assert floats == {"blocks.2.second", "blocks.2.short", "narrow"} and len(convolutions) == 12
    assert {each.fqn for each in report if "stays int8" in each.reason} == convolutions.keys() - floats
    targets = [node.target for node in lowered.graph.nodes]
    assert torch.ops.aten.add.Tensor not in targets and torch.ops.aten.relu.default not in targets
    assert dtypes(lowered, ops.TO_LEVELS) == [torch.uint8] and dtypes(lowered, ops.MAX_POOL2D) == [torch.uint8]
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        for exact, meant, found in zip(model(x), compiled.program.module()(x), run(x), strict=True):
            assert (meant - exact).norm() < 0.03 * exact.norm()
            assert (found - exact).norm() < 0.03 * exact.norm() and (found - meant).norm() < 0.02 * meant.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_sums_it_computes_what_the_program_says(dtype):
    model, compiled = made(Plain, dtype)
    _, report, run = lowered_of(compiled.program)
    x = torch.randn(3, 3, 32, 32).to(dtype)
    with torch.no_grad():
        (meant,), (found,), exact = compiled.program.module()(x), run(x), model(x)
    assert meant.dtype == found.dtype == dtype
    # A level that lies between two numbers may go either way, and bfloat16 is not rounded to on the way.
    assert (found - meant).norm() < (0.005 if dtype == torch.float32 else 0.05) * meant.norm()
    assert (found - exact).norm() < 0.08 * exact.norm()
    if dtype == torch.float32:
        kept = {each.fqn for each in report if "stays int8" in each.reason}
        assert kept == {each.fqn for each in report} - {"linears.4"}, "all but the last"


def test_one_layer_is_exact_to_float_rounding():
    torch.manual_seed(0)
    for layer, x in ((nn.Conv2d(8, 16, 3, 2, 1), torch.randn(2, 8, 9, 9)), (nn.Linear(24, 48), torch.randn(5, 24))):
        compiled = fxc.optimize(layer.eval(), (x,), "int8:mode=static", calib=[x])
        _, _, run = lowered_of(compiled.program)
        with torch.no_grad():
            torch.testing.assert_close(run(x)[0], compiled.program.module()(x)[0])


def test_where_convolutions_saturate_they_are_floats(monkeypatch):
    monkeypatch.setattr(int8_static, "conv2d_is_exact", lambda: False)
    model, compiled = made(Residual)
    lowered, report, run = lowered_of(compiled.program)
    assert not dtypes(lowered, ops.STATIC_CONV2D) and not dtypes(lowered, int8.STATIC_CONV2D)
    assert {each.op for each in report} == {"int8", "dequantized"} and "saturate" in report[-1].reason
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(run(x), model(x)))


@pytest.mark.fault(9)
def test_a_batch_may_be_empty():
    _, compiled = made(Residual)
    _, _, run = lowered_of(compiled.program)
    assert [list(each.shape) for each in run(torch.zeros(0, 3, 32, 32))] == [[0, 32], [0, 32]]


class PostNorm(nn.Module):
    """Layers that read a norm with large channels, as the sum behind them does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.a, self.b, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            self.norm.weight[3], self.norm2.bias[5] = 40, 30

    def forward(self, x):
        x = self.norm(x)
        x = self.norm2(x + torch.tanh(self.a(x)) * self.b(x))
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scales_of_smooth_are_a_part_of_rounding(dtype):
    torch.manual_seed(0)
    model, calib = PostNorm().eval().to(dtype), [torch.randn(9, 64).to(dtype) for _ in range(8)]
    errors, x = {}, torch.randn(20, 64).to(dtype)
    for passes in ("int8:mode=static", "int8:mode=static:smooth=false"):
        compiled = fxc.optimize(model, (calib[0],), passes, calib=calib, budget=9.0, layer_budget=9.0)
        lowered, _, run = lowered_of(compiled.program)
        with torch.no_grad():
            (meant,), (found,), exact = compiled.program.module()(x), run(x), model(x)
        assert (found - meant).norm() < (1e-3 if dtype == torch.float32 else 0.02) * meant.norm()
        errors[passes] = float((found - exact).norm() / exact.norm())
        products = [node for node in lowered.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
        assert len(products) == 1, "the model's own"
        given = [len(node.args) for node in lowered.graph.find_nodes(op="call_function", target=ops.TO_LEVELS)]
        assert given == ([4, 4] if passes == "int8:mode=static" else []), "a factor for each norm"
    if dtype == torch.float32:
        assert errors["int8:mode=static"] < 0.5 * errors["int8:mode=static:smooth=false"]
