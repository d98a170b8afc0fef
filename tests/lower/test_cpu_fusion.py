"""Norms with their sums, rotations and gates that become one call: the same numbers, and nothing that only looks like them."""

import pytest
import torch
from families import build
from torch import nn

from fxc.data.samples import samples
from fxc.frontend.capture import capture
from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable
from fxc_kernels.cpu import native_between, ops


@pytest.fixture(autouse=True)
def kernels_in_cpp(monkeypatch, no_kernels_in_cpp):
    monkeypatch.delenv("FXC_CPU_LEVEL")
    if why := native_between.why_not():
        pytest.skip(why)


def distance(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-2)).item()


def lowered(module, *inputs):
    program = capture(module.eval(), inputs)
    made, _ = lower_cpu(program)
    return program, made


def count(program, target):
    return len(program.graph.find_nodes(op="call_function", target=target))


class Rms(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(40).to(dtype))

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """Before the norm a sum, which others read too or not."""

    def __init__(self, norm, reads_sum):
        super().__init__()
        self.norm, self.reads_sum = norm, reads_sum

    def forward(self, x, y):
        total = x + y
        return self.norm(total) + total if self.reads_sum else self.norm(total)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("reads_sum", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without gains"])
def test_a_norm_and_its_sum_are_one_call(kind, reads_sum, dtype):
    torch.manual_seed(0)
    norm = Rms(dtype) if kind == "rms" else nn.LayerNorm(40, elementwise_affine=kind == "layer").to(dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    x, y = torch.randn(3, 7, 40).to(dtype), torch.randn(3, 7, 40).to(dtype)
    program, made = lowered(Block(norm, reads_sum), x, y)
    plain, with_sum = (ops.RMS_NORM, ops.ADD_RMS_NORM) if kind == "rms" else (ops.LAYER_NORM, ops.ADD_LAYER_NORM)
    assert (count(made, plain), count(made, with_sum)) == ((0, 1) if reads_sum or kind == "rms" else (1, 0))
    assert count(made, torch.ops.aten.add.Tensor) == int(reads_sum)
    module = runnable(made, "cpu", "eager")
    for a, b in ((x, y), (x[:1, :1], y[:1, :1]), (x.repeat(40, 9, 1), y.repeat(40, 9, 1)), (x[:0], y[:0])):
        got, expected = module(a, b)[0], program.module()(a, b)[0]
        assert got.dtype == dtype and got.shape == expected.shape
        assert distance(got, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_a_sum_that_is_read_before_the_norm():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(40)

        def forward(self, x, y):
            total = x + y
            return self.norm(total + 0 * torch.tanh(total)), self.norm(total), torch.tanh(total)

    x, y = torch.randn(3, 40), torch.randn(3, 40)
    program, made = lowered(Early(), x, y)
    for got, expected in zip(runnable(made, "cpu", "eager")(x, y), program.module()(x, y), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 40), (7, 1)])
def test_a_sum_that_is_broadcast_stays_one(shape):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.row = nn.LayerNorm(40), nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return self.norm(x + self.row)

    x = torch.randn(7, 40)
    program, made = lowered(Wide(), x)
    assert count(made, torch.ops.aten.add.Tensor) == 1 and count(made, ops.LAYER_NORM) == 1
    assert torch.allclose(runnable(made, "cpu", "eager")(x)[0], program.module()(x)[0], atol=1e-5)


def test_other_norms_stay_what_they_are():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm((4, 40))

        def forward(self, x):
            return self.norm(x)

    _, made = lowered(Two(), torch.randn(3, 4, 40))
    assert count(made, ops.LAYER_NORM) == 0
    _, made = lowered(Rms(torch.float64), torch.randn(3, 40, dtype=torch.float64))
    assert count(made, ops.RMS_NORM) == 0


@DTYPES
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_language_model_is_mostly_calls_of_its_own(family, dtype):
    model, inputs = build(family)
    model = model.to(dtype)
    program = capture(model, inputs) if isinstance(inputs, tuple) else capture(model)
    made, _ = lower_cpu(program)
    layers = model.config.num_hidden_layers
    assert count(made, ops.ROPE) == 2 * layers
    if family == "qwen2":
        assert count(made, ops.RMS_NORM) + count(made, ops.ADD_RMS_NORM) == 2 * layers + 1
        assert count(made, ops.SILU_MUL) == layers
        calls = made.graph.find_nodes(op="call_function", target=ops.ATTENTION)
        shared = [node.args[1].meta["val"].shape[1] for node in calls]
        assert shared == ([] if torch.cpu._is_amx_tile_supported() else [model.config.num_key_value_heads] * layers)
    for given in samples(program)[:2]:
        for got, expected in zip(runnable(made, "cpu", "eager")(*given), program.module()(*given), strict=True):
            assert got.dtype == expected.dtype and distance(got, expected) < (1e-5 if dtype == torch.float32 else 3e-2)


@DTYPES
def test_the_functions_on_tensors_of_any_layout(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 24).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(batch, 1, 9, 24).to(dtype) for batch in (1, 2))
    half = torch.cat([-x[..., 12:], x[..., :12]], -1)
    assert distance(native_between.rope(x, cos, sin), x.double() * cos.double() + half.double() * sin.double()) < 4e-3
    both = torch.randn(4, 5, 62).to(dtype)
    parts = both.split(31, -1)
    for gate, up in (parts, [each.transpose(0, 1) for each in parts], (both, both.flip(0))):
        expected = torch.nn.functional.silu(gate.double()) * up.double()
        assert distance(native_between.silu_mul(gate, up), expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_threads_change_nothing():
    x, other, weight = torch.randn(300, 200), torch.randn(300, 200), torch.rand(200)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((*native_between.add_layer_norm(x, other, weight, weight, 1e-5), native_between.silu_mul(x, other)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
