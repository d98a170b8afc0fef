"""The layers of encoders as one call: which programs have it, and that it changes nothing."""

import pytest
import torch
from families import build
from torch import nn

from fxc.data.samples import samples
from fxc.frontend.capture import capture
from fxc.lower import choose, cpu_rows
from fxc.lower.candidates import NATIVE_INT8
from fxc.lower.cpu import lower_cpu
from fxc.lower.held import held
from fxc.lower.runnable import runnable
from fxc.passes.base import Context
from fxc.pipeline import Options, run_passes
from fxc_kernels.cpu import native_rows, ops


@pytest.fixture(autouse=True)
def kernels_in_cpp(monkeypatch, no_kernels_in_cpp):
    monkeypatch.delenv("FXC_CPU_LEVEL")
    if why := native_rows.why_not():
        pytest.skip(why)
    # With it attention is not in C++, and neither is what is around it.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def int8(module, *inputs):
    program = capture(module.eval(), inputs) if inputs else capture(module)
    return run_passes(program, Context(), Options("int8"))[0]


def count(program, target=ops.ROWS):
    return len(program.graph.find_nodes(op="call_function", target=target))


def lowered(program, monkeypatch):
    """(in one call, one by one), with attention as exact in both."""
    made = lower_cpu(program, measure=choose.compressed, bf16=False)[0]
    with monkeypatch.context() as patch:
        patch.setattr(cpu_rows, "fuse", lambda *given: None)
        return made, lower_cpu(program, measure=choose.compressed, bf16=False)[0]


def distance(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-2)).item()


@pytest.mark.parametrize(("family", "steps"), [("bert", 15), ("distilbert", 15), ("vit", 15), ("t5", 16), ("clip", None)])
def test_an_encoder_is_one_call_with_the_same_bits(family, steps, monkeypatch):
    program = int8(build(family)[0])
    made, single = lowered(program, monkeypatch)
    assert count(single) == 0 < count(made)
    if steps:
        (call,) = made.graph.find_nodes(op="call_function", target=ops.ROWS)
        assert len(call.args[4]) == steps * native_rows.WIDTH
        assert count(made, ops.ATTENTION) == (4 if family == "t5" else 0)  # its decoder's
    for given in samples(program)[:3]:
        for y, expected in zip(runnable(made, "cpu", "eager")(*given), runnable(single, "cpu", "eager")(*given), strict=True):
            assert y.dtype == expected.dtype and y.shape == expected.shape
            # Few keys have another order of sums.
            assert torch.equal(y, expected) or distance(y, expected) < 2e-2


def test_decoders_and_other_backends_have_none(monkeypatch):
    assert count(lowered(int8(build("qwen2")[0]), monkeypatch)[0]) == 0
    assert count(lower_cpu(int8(build("bert")[0]), "inductor", measure=choose.compressed)[0]) == 0
    monkeypatch.setattr(native_rows, "why_not", lambda: "of the test")
    assert count(lower_cpu(int8(build("bert")[0]), measure=choose.compressed)[0]) == 0


class Block(nn.Module):
    """Attention and a layer behind it; `between` is done with what attention gives, `reads` with what is there at the end."""

    def __init__(self, between=lambda x: x, reads=lambda x, product, attended: x, depth=16):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.norm = nn.LayerNorm(64)
        self.between, self.reads, self.depth = between, reads, depth

    def forward(self, x):
        product = self.q(x)
        heads = [each(x).view(*x.shape[:2], -1, self.depth).transpose(1, 2) for each in (self.q, self.k, self.v)]
        attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        return self.reads(self.norm(self.out(self.between(attended)) + x), product, attended)


@pytest.mark.parametrize(
    ("block", "calls", "results"),
    [
        (Block(), 1, 1),
        (Block(reads=lambda x, product, attended: (x, product.sum(-1), attended * 2)), 1, 3),
        (Block(reads=lambda x, product, attended: x + product.mean()), 1, 2),
        (Block(between=torch.tanh), 1, 1),  # two steps, then two that have no attention
        (Block(depth=8), 0, 0),  # heads that attention in C++ does not take
    ],
)
def test_what_others_read_is_given_back(block, calls, results, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 64)
    made, single = lowered(int8(block, x), monkeypatch)
    assert count(made) == calls
    for call in made.graph.find_nodes(op="call_function", target=ops.ROWS):
        assert len(call.args[5]) == results
    for each in (x, torch.randn(1, 9, 64), torch.randn(5, 40, 64)):
        for y, expected in zip(runnable(made, "cpu", "eager")(each), runnable(single, "cpu", "eager")(each), strict=True):
            assert torch.equal(y, expected)


def test_a_step_that_depends_on_what_is_none_begins_another_call(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            return self.second(self.first(x).cumsum(1) / 8)

    torch.manual_seed(0)
    x = torch.randn(2, 12, 64)
    made, single = lowered(int8(Two(), x), monkeypatch)
    assert count(made) == 2
    assert torch.equal(runnable(made, "cpu", "eager")(x)[0], runnable(single, "cpu", "eager")(x)[0])


def test_what_it_holds_is_told_by_form():
    def measure(forms, *layer):  # in float for few rows
        return {rows: (0.5 if rows > 16 else 2.0, *[1.0] * (len(forms) - 1)) for rows in forms[0].rows}

    torch.manual_seed(0)
    x = torch.randn(2, 12, 64)
    program = int8(Block(), x)
    made = lower_cpu(program, measure=measure, keep_float=9)[0]
    assert count(made) == 1 and {"int8 packed", "float copies", "scales, norms and biases"} == set(held(made))
    for each in (x, torch.randn(1, 3, 64)):
        assert distance(runnable(made, "cpu", "eager")(each)[0], program.module()(each)[0]) < 2e-2


def test_attention_may_be_in_bfloat16_where_lowering_may(monkeypatch):
    x = torch.randn(2, 12, 64)
    program = int8(Block(), x)
    for is_there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_there=is_there: is_there)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        (call,) = lower_cpu(program, measure=choose.compressed)[0].graph.find_nodes(op="call_function", target=ops.ROWS)
        (attention,) = [step for step in native_rows._decoded(tuple(call.args[4])) if step.kind == native_rows.ATTENTION]
        assert attention.numbers[9] == is_there


@pytest.mark.parametrize(("price", "in_one_call", "alone"), [(1.2, True, True), (0.9, True, False), (0.5, False, False)])
def test_int8_that_is_one_call_with_others_counts_less(price, in_one_call, alone, monkeypatch):
    """Float that is a little faster alone is not taken for it in an encoder. price: of float, in times of int8."""

    def measure(forms, *layer):
        return {count: tuple(1e-6 if form is NATIVE_INT8 else price * 1e-6 for form in forms) for count in NATIVE_INT8.rows}

    program = int8(build("bert")[0])
    made, report = lower_cpu(program, measure=measure)
    assert bool(count(made)) == in_one_call
    assert not in_one_call or any("int8 1 us" in each.reason and "counts 0.8 of that" in each.reason for each in report)
    monkeypatch.setattr(native_rows, "why_not", lambda: "of the test")
    assert bool(count(lower_cpu(program, measure=measure)[0], ops.NATIVE_INT8_LINEAR)) == alone
