"""Layers that run in the kernels in C++: which are chosen, and that programs compute what they computed."""

import pytest
import torch
from int8_programs import program_of
from lowered import on_cpu
from torch import nn

from fxc.frontend.capture import capture
from fxc.lower.candidates import FLOAT, INT8, NATIVE_INT4, NATIVE_INT8, NATIVE_SPLIT, SPLIT, STATIC
from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable
from fxc.passes.base import Context
from fxc.pipeline import Options, run_passes
from fxc_kernels.cpu import native_int4, native_int8, ops

BACKENDS = ("eager", "inductor")


@pytest.fixture(autouse=True)
def kernels_in_cpp(monkeypatch, no_kernels_in_cpp):
    monkeypatch.delenv("FXC_CPU_LEVEL")
    if why := native_int8.why_not() or native_int4.why_not():
        pytest.skip(why)


def preferring(wanted):
    """A measurement in which the form `wanted` is twice as fast as all others."""

    def measure(forms, rows, columns, dtype):
        return {count: tuple(0.5 if each is wanted else 1.0 for each in forms) for count in forms[0].rows}

    return measure


def passed(spec, module, x):
    program = capture(module.eval(), (x,))
    return run_passes(program, Context(), Options(spec))[0]


def calls(module, target):
    """Of a lowered module, whose operators are functions by then."""
    wanted = {target, *ops.FUNCTIONS[target]}
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target in wanted]


def distance(y, expected):
    """Of the result's norm. Behind an activation, another last bit may round to another integer."""
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


class Mlp(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 96), act, nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(self.act(self.up(x))) + x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spec", "form", "near"),
    [("int8", NATIVE_INT8, 5e-3), ("int8:mode=weight_only", NATIVE_SPLIT, 1e-4), ("int4:group=32", NATIVE_INT4, 2e-2),
     ("int4:group=32:symmetric=false", NATIVE_INT4, 2e-2), ("int4:bits=3:group=32", NATIVE_INT4, 2e-2),
     ("int4:bits=2:group=32", NATIVE_INT4, 2e-2)],
)  # fmt: skip
def test_programs_compute_what_they_computed(spec, form, near, dtype, backend):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64).to(dtype)
    program = passed(spec, Mlp(nn.GELU()).to(dtype), x)
    module, layers = on_cpu(program, backend, measure=preferring(form))
    assert {layer.op for layer in layers} == {form.name} and form.timed_as in layers[0].reason
    for each in (x, x[:1, :1], x.repeat(20, 7, 1), x[:0]):
        y, expected = module(each)[0], program.module()(each)[0]
        assert y.dtype == dtype and y.shape == expected.shape
        if each.numel():
            assert distance(y, expected) < (near if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU()], ids=str)
def test_the_activation_behind_a_layer_is_a_part_of_its_call(act):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    program = passed("int8", Mlp(act), x)
    module, _ = on_cpu(program, measure=preferring(NATIVE_INT8))
    assert len(calls(module, ops.NATIVE_INT8_LINEAR)) == 2
    assert len([node for node in module.graph.nodes if node.op == "call_function"]) == 3  # and the sum
    assert distance(module(x)[0], program.module()(x)[0]) < 5e-3


def test_an_activation_that_it_does_not_know_stays_where_it_is():
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    program = passed("int8", Mlp(nn.Tanh()), x)
    module, _ = on_cpu(program, measure=preferring(NATIVE_INT8))
    assert [node for node in module.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert distance(module(x)[0], program.module()(x)[0]) < 5e-3


def test_int4_stays_int4_where_that_beats_float_though_another_form_is_faster(monkeypatch):
    program = passed("int4:group=32", nn.Linear(64, 96), torch.randn(3, 64))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    def measure(forms, *layer):
        assert forms == (NATIVE_INT4, SPLIT, FLOAT)
        return {rows: (0.5, 0.1, 1.0) for rows in NATIVE_INT4.rows}

    lowered, (layer,) = on_cpu(program, measure=measure)
    assert layer.op == "int4" and calls(lowered, ops.NATIVE_INT4_LINEAR)
    held = sum(each.numel() * each.element_size() for each in lowered.buffers())
    assert held < 96 * 64  # a byte a number would be more

    def slower(forms, *layer):
        return {rows: (2.0, 0.1, 1.0) for rows in NATIVE_INT4.rows}

    assert on_cpu(program, measure=slower)[1][0].op == "int8"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seen = []
    on_cpu(program, measure=lambda forms, *layer: seen.append(forms) or {1: (0.5, 1.0)})
    assert seen == [(NATIVE_INT4, FLOAT)]


@pytest.mark.parametrize(
    ("spec", "form", "there"), [("int8", NATIVE_INT8, "above"), ("int8:mode=weight_only", NATIVE_SPLIT, "up to")]
)
def test_a_small_layer_is_float_where_that_is_faster(spec, form, there):
    x = torch.randn(40, 64)
    program = passed(spec, nn.Linear(64, 96), x)

    def measure(forms, *layer):
        times = {rows: [1.0] * len(forms) for rows in form.rows}
        wins = max(times) if form.wins_for == "many" else min(times)
        times[wins][forms.index(form)] = 0.5
        return {rows: tuple(each) for rows, each in times.items()}

    module, (layer,) = on_cpu(program, measure=measure, keep_float=9)  # memory is no matter here
    assert layer.op.startswith(f"int8 {there} M=")
    for rows in (1, 40, 300):
        given = torch.randn(rows, 64)
        assert torch.allclose(module(given)[0], program.module()(given)[0], atol=6e-2)


def test_layers_that_read_one_activation_are_one_call():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32, bias=bias) for bias in (True, False, True))

        def forward(self, x):
            return self.q(x), self.k(x), self.v(x)

    x = torch.randn(3, 32)
    program = passed("int8", Three(), x)
    module, layers = on_cpu(program, measure=preferring(NATIVE_INT8))
    assert len(calls(module, ops.NATIVE_INT8_LINEAR)) == 1 and "one product with q, k, v" in layers[0].reason
    for y, expected in zip(module(x), program.module()(x), strict=True):
        assert torch.allclose(y, expected, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, q, k, v, mask):
        q, k, v = (each * self.gain for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="left to torch where there is AMX")
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_one_call(backend):
    q, k, v = (torch.randn(2, 4, 20, 32) for _ in range(3))
    mask = torch.rand(2, 1, 20, 20) > 0.3
    program = capture(Attention(32).eval(), (q, k, v, mask))
    lowered, _ = lower_cpu(program, backend)
    assert lowered.graph.find_nodes(op="call_function", target=ops.ATTENTION)
    module = runnable(lowered, "cpu", backend)
    for given in ((q, k, v, mask), tuple(each.repeat(2, *[1] * (each.dim() - 1)) for each in (q, k, v, mask))):
        assert torch.allclose(module(*given)[0], program.module()(*given)[0], atol=1e-5)


@pytest.mark.parametrize("width", [8, 24])
def test_attention_of_other_widths_stays_what_it_is(width):
    q = torch.randn(2, 4, 20, width)
    program = capture(Attention(width).eval(), (q, q, q, torch.ones(20, 20, dtype=torch.bool)))
    assert not lower_cpu(program)[0].graph.find_nodes(op="call_function", target=ops.ATTENTION)


def test_what_it_cannot_multiply_it_says(monkeypatch):
    program = program_of(nn.Sequential(nn.Linear(32, 24)), torch.randn(1, 3, 32))
    monkeypatch.setenv("FXC_CPU_LEVEL", "none")
    seen = []
    on_cpu(program, measure=lambda forms, *layer: seen.append(forms) or {1: (1.0, 2.0)})
    assert seen == [(INT8, FLOAT)]
    assert STATIC.targets != NATIVE_INT8.targets
