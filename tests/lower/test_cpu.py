"""Lowering for the CPU: the lowered module computes what the program says, in the program's dtype."""

import copy
import shutil

import pytest
import torch
from int8_programs import int8_wins, program_of, timing
from lowered import on_cpu
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import fxc
from fxc.errors import UsageError
from fxc.lower import choose
from fxc.lower.candidates import FLOAT, INT8, SPLIT
from fxc.lower.cpu import lower_cpu
from fxc_kernels.cpu import int8_linear, int8_product, ops

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
HEADS, WIDTH = 2, 32


class Block(nn.Module):
    """q, k and v share an activation; `down` reads the result of `up` directly."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, True))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, 5, bias=False)

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        hidden = gelu(self.up(self.norm(mixed + x)))
        return hidden, self.down(hidden)


def few_rows_win(*size):
    return {1: (0.1, 1.0), 16: (0.1, 1.0), 128: (2.0, 1.0)}


@pytest.fixture
def x():
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 400), (0, 4), (2, 0)], ids=str)
def test_eager_float32_matches_the_program(x, shape):
    program = program_of(Block(), x)
    lowered, _ = on_cpu(program, "eager", measure=int8_wins, bf16=False)
    x = torch.randn(*shape, WIDTH)
    # Wide enough for a few activations so near to a half that the last bit decides how they round.
    close(lowered(x), program.module()(x), 2e-4)


def biased(x):
    """A program whose int8 layer reads rows far from 0 through weights whose sums are far from 0, and such rows."""
    model = nn.Sequential(nn.Linear(WIDTH, 24))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    return program_of(model, x), gelu(3 * x) + 2


# Inductor compiles C++, which takes long: a plain run has it where nothing else would.
BACKENDS = ["eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_points_are_taken_out_exactly(x, backend):
    program, x = biased(x)
    lowered, _ = on_cpu(program, backend, measure=int8_wins)
    close(lowered(x), program.module()(x), 1e-6)
    x[0, 1] = 0
    x[1, 2, 3] = float("inf")
    x[1, 4, 5] = float("nan")
    (out,), bias = lowered(x), program.constants["0.bias"]
    torch.testing.assert_close(out[0, 1], bias, rtol=0, atol=1e-6)
    assert not torch.isfinite(out[1, [2, 4]]).any()
    out[1, [2, 4]] = 0
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lowering_without_the_zero_point_term_is_noticed(x, backend, monkeypatch):
    program, x = biased(x)
    term = int8_linear.zero_point_term
    for wrong in (lambda *a: 0 * term(*a), lambda *a: -term(*a), lambda *a: term(*a).bfloat16().float()):
        monkeypatch.setattr(int8_linear, "zero_point_term", wrong)
        lowered, _ = on_cpu(program, backend, measure=int8_wins)
        with pytest.raises(AssertionError):
            close(lowered(x), program.module()(x), 1e-6)


@pytest.mark.fault(20)
def test_eager_bfloat16_keeps_its_dtype(x):
    program = program_of(Block().bfloat16(), x.bfloat16())
    lowered, _ = on_cpu(program, "eager", measure=int8_wins)
    close(lowered(x.bfloat16()), program.module()(x.bfloat16()), 2e-2)


def test_weights_that_read_one_activation_share_one_product(x):
    program = program_of(Block(), x)
    lowered, report = lower_cpu(program, "eager", measure=int8_wins)
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.INT8_LINEAR)) == 3
    assert [c.fqn for c in report] == ["q", "k", "v", "up", "down"]
    assert {c.op for c in report} == {"int8"} and "one product with q, k, v" in report[0].reason
    assert [(c.out_features, c.in_features) for c in report] == [(32, 32)] * 3 + [(48, 32), (5, 48)]


def test_an_activation_is_applied_once(x):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.other = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def forward(self, x):
            y = self.up(torch.sin(x))
            return gelu(y, approximate="tanh"), torch.relu(self.other(x))

    program = program_of(Gated(), x)
    for measure in (int8_wins, lambda *size: {1: (2.0, 1.0), 16: (0.5, 1.0), 128: (0.1, 1.0)}, timing(2.0)):
        lowered, report = on_cpu(program, "eager", measure=measure)
        absorbed = 0 if report[0].op == "dequantized" else 2
        assert len([n for n in lowered.graph.nodes if n.op == "call_function" and "lu" in n.name]) == 2 - absorbed
        close(lowered(x), program.module()(x), 1e-5 if absorbed else 0.05)
    close(lowered(x[:1, :1]), program.module()(x[:1, :1]), 0.05)


def test_the_program_is_not_changed(x):
    program = program_of(Block(), x)
    before, names, expected = str(program.graph), set(program.constants), program.module()(x)
    on_cpu(program, "eager", measure=int8_wins)
    assert str(program.graph) == before and set(program.constants) == names
    assert all(torch.equal(a, b) for a, b in zip(program.module()(x), expected))


def test_a_layer_measured_slower_as_int8_is_dequantized_and_says_so(x):
    block = Block()
    lowered, report = on_cpu(program_of(block, x), "eager", measure=timing(2.0), bf16=False)
    assert all(c.op == "dequantized" and c.reason.startswith("dequantized: int8 was slower") for c in report)
    # Without quantized activations it is the weight-only program.
    close(lowered(x), program_of(block, x, "int8_weight_only_linear").module()(x), 1e-5)
    assert not any(t.dtype == torch.int8 for t in lowered.state_dict().values())


def test_a_layer_slower_for_few_rows_only_chooses_by_rows(x):
    program = program_of(Block(), x)
    mixed = lambda *size: {1: (2.0, 1.0), 16: (0.5, 1.0), 128: (0.1, 1.0)}  # noqa: E731
    lowered, report = on_cpu(program, "eager", measure=mixed, bf16=False, keep_float=9)
    assert {c.op for c in report} == {"int8 above M=1, float below"}
    close(lowered(x), program.module()(x), 1e-5)
    one = x[:1, :1].contiguous()
    dense, _ = on_cpu(program, "eager", measure=timing(2.0), bf16=False)
    close(lowered(one), dense(one), 1e-6)


def test_where_products_are_wrong_everything_is_dequantized(x, monkeypatch):
    monkeypatch.setattr(int8_product, "int8_is_exact", lambda: False)
    for measure in (None, int8_wins, choose.compressed):
        _, report = on_cpu(program_of(Block(), x), "eager", measure=measure)
        assert {c.op for c in report} == {"dequantized"} and "not exact" in report[0].reason


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 40), (0, 3)], ids=str)
def test_weight_only_is_nearly_exact_on_both_sides_of_its_limit(x, shape):
    program = program_of(Block(), x, "int8_weight_only_linear")
    lowered, report = on_cpu(program, "eager", measure=few_rows_win, bf16=False, keep_float=9)
    assert {c.op for c in report} == {"int8 up to M=16, float above"}
    x = torch.randn(*shape, WIDTH)
    close(lowered(x), program.module()(x), 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_only_is_measured_too(x, backend):
    program = program_of(Block(), x, "int8_weight_only_linear")
    lowered, report = on_cpu(program, backend, measure=timing(2.0))
    assert {c.op for c in report} == {"dequantized"} and "int8 was slower" in report[0].reason
    assert not any(t.dtype == torch.int8 for t in lowered.state_dict().values())
    _, report = on_cpu(program, backend)
    assert all("M=1: int8" in c.reason and "M=32: int8" in c.reason for c in report)


@needs_compiler
def test_bfloat16_inside_stays_within_the_noise_of_int8(x):
    block = Block()
    program = program_of(block, x)
    with torch.no_grad():
        truth = block(x)
    lowered, _ = on_cpu(program, "inductor", measure=int8_wins)
    for got, plain, true in zip(lowered(x), program.module()(x), truth):
        noise = (plain - true).norm()
        assert (got - true).norm() <= 1.5 * noise and got.dtype == torch.float32


@needs_compiler
def test_attention_over_skipped_layers_keeps_float32(x):
    program = program_of(Block(), x, skip=("q",))
    lowered, _ = on_cpu(program, "inductor", measure=int8_wins)
    attention = lowered.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert all("to_dtype" not in str(argument) for node in attention for argument in node.args)


def test_decisions_follow_the_timings():
    assert choose.dense_limit({1: (1, 2), 16: (1, 2), 128: (1, 2)}) == 0
    assert choose.dense_limit({1: (3, 2), 16: (1, 2), 128: (1, 2)}) == 1
    assert choose.dense_limit({1: (1, 2), 16: (3, 2), 128: (1, 2)}) == 16
    assert choose.dense_limit({1: (1, 2), 16: (1, 2), 128: (3, 2)}) is None
    assert choose.dense_limit({1: (2, 2), 16: (1, 2), 128: (1, 2)}) == 1


def test_weight_only_decisions_follow_the_timings():
    assert choose.split_limit({1: (1, 2), 8: (1, 2), 32: (1, 2)}) is None
    assert choose.split_limit({1: (1, 2), 8: (1, 2), 32: (3, 2)}) == 8
    assert choose.split_limit({1: (3, 2), 8: (1, 2), 32: (1, 2)}) == 0
    assert choose.split_limit({1: (2, 2), 8: (1, 2)}) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_layer_has_one_form(x, backend, monkeypatch):
    seconds = {1: (0.1, 1.0), 16: (0.5, 1.0), 128: (1.1, 1.0)}
    on_the_whole = {1: (0.9, 1.0), 16: (1.5, 1.0), 128: (2.0, 1.0)}
    for_many_rows = {1: (0.1, 1.0), 16: (0.5, 1.0), 128: (2.0, 1.0)}
    monkeypatch.setattr(choose, "SMALL_LAYER", 0)
    for op in ("int8_linear", "int8_weight_only_linear"):
        program = program_of(Block(), x, op)
        lowered, report = on_cpu(program, backend, measure=lambda *size: seconds, bf16=False)
        assert {each.op for each in report} == {"int8"} and "M=128: int8 1100000 us" in report[0].reason
        assert not any(t.dtype == torch.float32 and t.dim() == 2 and len(t) > 1 for t in lowered.state_dict().values())
        close(lowered(x), program.module()(x), 2e-4)
        for slower in (on_the_whole, for_many_rows):
            _, report = on_cpu(program, backend, measure=lambda *size, slower=slower: slower, bf16=False)
            assert {each.op for each in report} == {"dequantized"} and "int8 was slower" in report[0].reason


def test_layers_stay_compressed_when_that_is_asked_for(x):
    for op, form in (("int8_linear", "int8"), ("int8_weight_only_linear", "int8")):
        program = program_of(Block(), x, op)
        lowered, report = on_cpu(program, "eager", measure=choose.compressed, bf16=False)
        assert {(each.op, each.reason.partition(";")[0]) for each in report} == {(form, "asked for")}
        close(lowered(x), program.module()(x), 2e-4)


@pytest.mark.parametrize("form", [INT8, SPLIT], ids=lambda form: form.kind)
@pytest.mark.parametrize("whole", [False, True])
def test_measuring_covers_every_row_count_and_is_kept(form, whole, monkeypatch):
    monkeypatch.setattr(choose, "_noise", lambda *race: None)
    first = choose.measure((form, FLOAT), 24, 16, torch.float32, whole, 1)
    assert tuple(first) == form.rows and all(a > 0 and b > 0 for a, b in first.values())
    assert choose.measure((form, FLOAT), 24, 16, torch.float32, whole, 1) is first


def test_refusals(x):
    program = program_of(Block(), x)
    with pytest.raises(UsageError, match="backend"):
        on_cpu(program, "tvm")
    program.constants = {name: t.to("meta") for name, t in program.constants.items()}
    with pytest.raises(UsageError, match="without weights"):
        on_cpu(program)


@pytest.mark.fault(31)
def test_inductor_without_a_compiler_says_what_to_do(x, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(UsageError, match="backend=eager"):
        on_cpu(program_of(Block(), x), "inductor", measure=int8_wins)


@needs_compiler
def test_inductor_follows_the_program_over_changing_shapes(x):
    program = program_of(Block(), x)
    lowered, _ = on_cpu(program, "inductor", measure=int8_wins, bf16=False)
    for shape in [(2, 9), (9, 9), (3, 40), (1, 1)]:
        x = torch.randn(*shape, WIDTH)
        close(lowered(x), program.module()(x), 2e-4)
    assert sum(map(len, lowered._known.values())) == 2


@pytest.mark.slow
@needs_compiler
def test_inductor_weight_only(x):
    program = program_of(nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU()), x, "int8_weight_only_linear")
    lowered, _ = on_cpu(program, "inductor", measure=few_rows_win, bf16=False, keep_float=9)
    for shape in [(2, 7), (3, 40), (3, 5)]:
        x = torch.randn(*shape, WIDTH)
        close(lowered(x), program.module()(x), 2e-4)
    assert sum(map(len, lowered._known.values())) == 2


def test_a_compiled_model_that_ran_can_be_copied():
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    model = fxc.optimize(nn.Linear(64, 64).bfloat16().eval(), (x,), passes="", verify=False)
    expected = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), expected) and other.lower() is model.lower() and other.program is not model.program
