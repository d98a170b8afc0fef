"""smooth and awq move scales of channels between layers, change nothing, and say where they do not apply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, build
from torch import nn

import fxc
from fxc.analysis.channels import reach
from fxc.calibrate.awq import awq
from fxc.calibrate.levels import Levels
from fxc.data.samples import drawn
from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.order import order
from fxc.pipeline import run_passes
from fxc.schemes.scheme import LINEAR

QUICK = {"gemma", "vit", "mixtral"}
DIFFERENT = [name for name in FAMILIES if name not in ("llama", "mistral", "qwen3_moe")]  # those are others with other numbers
NOWHERE = {"resnet", "mobilenetv2", "mlp"}


def ran(model: nn.Module, example, spec: str, **options):
    """(program before, after, the step of the last pass)"""
    program = fxc.capture(model, example) if example else fxc.capture(model)
    context = Context(samples=drawn(program, seed=0)[:4], **options)
    after, steps = run_passes(program, context, Options(spec))
    return program, after, steps[-1]


@pytest.mark.parametrize("spec", ["smooth", "awq:group=32"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in DIFFERENT])
def test_nothing_changes_in_any_family(name, spec):
    model, example = build(name)
    _, _, step = ran(model, example, spec)
    assert (step.changed == 0) == (name in NOWHERE)
    # The gate compares in float64 and allows 1e-10.
    assert name in NOWHERE or "in float64, run there too" in step.gates["meaning"]


class Block(nn.Module):
    """Attention with heads that share values, and a gated part, as encoders have them."""

    def __init__(self, shared: bool = True):
        super().__init__()
        self.shared = shared
        self.norm, self.norm2 = nn.LayerNorm(32), nn.RMSNorm(32, elementwise_affine=False)
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 2 * (16 if shared else 32))
        self.o, self.gate_up, self.down = nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x):
        y = self.norm(x)
        q, (k, v) = self.q(y), self.kv(y).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def reached(program, layer: str):
    [source] = [n for n in program.graph.nodes if n.target is LINEAR and n.args[1].target == f"{layer}.weight"]
    return reach(program, source)


def test_channels_are_followed_through_heads_and_halves():
    torch.manual_seed(0)
    program, after, step = ran(Block().eval().double(), (torch.randn(2, 5, 32, dtype=torch.float64),), "smooth")
    found = reached(program, "kv")
    [(o, channels)] = found.readers.items()
    # Four query heads of eight read two heads of values, which are the second half of kv.
    values = torch.arange(16, 32).reshape(2, 8)
    assert o.args[1].target == "o.weight" and torch.equal(channels, values.repeat_interleave(2, 0).flatten())
    assert set(found.blocked) == set(range(16)) and "attention" in found.blocked[0]
    found = reached(program, "gate_up")
    assert torch.equal(found.readers.popitem()[1], torch.arange(64, 128)) and set(found.blocked) == set(range(64))
    assert step.changed == 4 and not step.refusals
    # The norm without a gain has one now, and keys stay as they were.
    assert "norm2.weight" in after.constants
    before, now = program.constants["kv.bias"], after.constants["kv.bias"]
    assert torch.equal(before[:16], now[:16]) and not torch.isclose(before[16:], now[16:]).any()


def test_the_scale_is_that_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16)).eval().double()
    nn.init.uniform_(model[0].weight, 0.1, 9)
    program = fxc.capture(model, (torch.randn(7, 8, dtype=torch.float64),))
    samples = drawn(program, seed=0)
    after, _ = run_passes(program, Context(samples=samples), Options("smooth:alpha=0.7"))
    with torch.no_grad():
        largest = torch.cat([model[0](s[0]) for s in samples]).abs().amax(0)
    s = largest**0.7 / model[1].weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(after.constants["1.weight"], model[1].weight.detach() * s, rtol=1e-5, atol=0)
    torch.testing.assert_close(after.constants["0.weight"], model[0].weight.detach() / s, rtol=1e-5, atol=0)


def test_awq_loses_less_where_some_channels_are_large():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64, bias=False)).eval()
    with torch.no_grad():
        # Each group of 32 has a large weight, by which the others are rounded.
        model[0].weight[:4], model[1].weight[:, [10, 40]] = 30, 1
    program = fxc.capture(model, (torch.randn(7, 64),))
    samples = drawn(program, seed=0)

    def loss(spec: str) -> float:
        after, _ = run_passes(program, Context(samples=samples), Options(spec, layer_budget=9.0, budget=9.0))
        x = samples[0]
        return float((after.module()(*x)[0] - program.module()(*x)[0]).norm())

    assert loss("awq:group=32,int4:group=32") < 0.8 * loss("int4:group=32")


@pytest.mark.parametrize("after, levels", [
    ("int4:group=32:bits=3:symmetric=false", Levels(3, 32, symmetric=False)),
    ("int4:group=auto:full_range=false", Levels(4, 64, full_range=False)),
    ("int8", Levels(8, -1, full_range=False, balanced=True)),
    ("int4:only=elsewhere.*:bits=2,int4:group=32", Levels(4, 32)),
])  # fmt: skip
def test_awq_is_for_what_its_weights_are_rounded_to(after, levels, monkeypatch):
    torch.manual_seed(0)
    program = fxc.capture(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval(), (torch.randn(7, 64),))
    context = Context(samples=drawn(program, seed=0)[:4], later=tuple(parse_passes(after)))
    given = []

    def seen(weights, size, curvature, levels):
        given.append(levels)
        return awq(weights, size, curvature, levels)

    monkeypatch.setattr("fxc.passes.awq.awq", seen)
    for spec in ("awq", "awq:bits=2:group=-1"):
        parse_passes(spec)[0].run(program.copy(), context)
    assert given == [levels, replace(levels, bits=2, group=-1)]


def test_awq_is_told_what_follows():
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)).eval()
    _, _, step = ran(model, (torch.randn(7, 32),), "awq")
    assert step.changed == 0 and "group=128 does not divide its rows of 32" in str(step.refusals)
    program = fxc.capture(model, (torch.randn(7, 32),))
    _, steps = run_passes(program, Context(samples=drawn(program, seed=0)[:4]), Options("awq,int4:group=32"))
    assert [(step.name.partition(":")[0], step.changed) for step in steps][-2:] == [("awq", 1), ("int4", 1)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.a(self.norm(x)) + self.b(self.norm(2 * x))


class PostNorm(nn.Module):
    """What the norm gives is added behind the layers that read it."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        nn.init.uniform_(self.norm.weight, 0.1, 9)

    def forward(self, x):
        y = self.norm(x)
        return y + self.a(y) * self.b(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_residual_sum_reads_too_is_divided_apart(dtype):
    torch.manual_seed(0)
    model, x = PostNorm().eval().to(dtype), torch.randn(7, 32).to(dtype)
    program, after, step = ran(model, (x,), "smooth")
    [product] = after.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[:1]
    assert step.changed == 1 and product.args[1].target == "norm.factor" and len(product.users) == 2
    assert torch.equal(after.constants["norm.weight"], program.constants["norm.weight"])
    factor = after.constants["norm.factor"]
    for layer in "ab":
        expected = (program.constants[f"{layer}.weight"].double() * (1 / factor.double())).to(dtype)
        assert torch.equal(after.constants[f"{layer}.weight"], expected)
    _, _, step = ran(model, (x,), "awq:group=32")
    assert step.changed == 0 and "reads it" in step.refusals[0].reason, "awq adds nothing to the program"


@pytest.mark.parametrize(
    "model, why",
    [
        (Tied(), "read by others too"),
        (nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)), "aten.gelu"),
        (nn.Sequential(nn.LayerNorm(32), nn.Sigmoid(), nn.Linear(32, 32)), "aten.sigmoid"),
    ],
)
def test_it_declines_with_the_reason(model, why):
    _, _, step = ran(model.eval(), (torch.randn(3, 32),), "smooth")
    assert step.changed == 0 and any(why in refusal.reason for refusal in step.refusals), step.refusals


class Ramp(nn.Module):
    """A gain that is computed of nothing."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * (1 + torch.arange(32, dtype=x.dtype)))


def test_a_gain_without_any_input_is_a_constant():
    torch.manual_seed(0)
    program, after, step = ran(Ramp().eval().double(), (torch.randn(3, 32, dtype=torch.float64),), "smooth")
    [gain] = set(after.constants) - set(program.constants)
    factor = (1 + torch.arange(32)) / after.constants[gain]
    expected = program.constants["down.weight"] * factor
    assert step.changed == 1 and torch.allclose(after.constants["down.weight"], expected, rtol=1e-12)


def test_relu_passes_a_scale_and_a_skipped_layer_keeps_its_weight():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    _, after, step = ran(model, (torch.randn(3, 32),), "smooth")
    assert step.changed == 1 and after.metadata["scaled"]
    _, _, step = ran(model, (torch.randn(3, 32),), "smooth", skip="2")
    assert step.changed == 0 and any("skipped by the pattern 2" in refusal.reason for refusal in step.refusals)


def test_awq_says_which_group_fits_and_where_values_are_shared():
    example = (torch.randn(2, 5, 32),)
    _, _, step = ran(Block().eval(), example, "awq")
    assert step.changed == 0 and any("use group=32" in refusal.reason for refusal in step.refusals)
    _, _, step = ran(Block().eval(), example, "awq:group=32")
    assert any("one channel" in refusal.reason for refusal in step.refusals) and step.changed == 3


@pytest.mark.parametrize("name", ["smooth", "awq"])
def test_without_data_and_out_of_order(name):
    program = fxc.capture(nn.Linear(32, 32).eval(), (torch.randn(3, 32),))
    with pytest.raises(UsageError, match="measured on calibration data"):
        run_passes(program, Context(), Options(name))
    ordered = [p.name for p in order(parse_passes(f"int8,{name},prune:ffn=0.25")).passes]
    assert ordered.index("prune") < ordered.index(name) < ordered.index("int8")


def test_what_does_not_exist():
    for spec in ("smooth:alpha=2", "awq:bits=5", "awq:group=7"):
        with pytest.raises(UsageError):
            parse_passes(spec)
