"""Lowering for CUDA, as far as a machine without a GPU can tell: the rewritten graph, run on a CPU.

There its operators compute their definitions in plain torch; one test runs the kernels themselves in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from families import build
from repo import REPO
from torch import nn

triton = pytest.importorskip("triton", reason="no Triton on this platform")

from interpreter import needs_interpreter  # noqa: E402
from lowered import for_cuda, on_cpu  # noqa: E402

from fxc import optimize  # noqa: E402
from fxc.data.samples import samples  # noqa: E402
from fxc.errors import UsageError  # noqa: E402
from fxc.schemes import sparse24  # noqa: E402
from fxc_kernels.cuda import dispatch  # noqa: E402
from fxc_kernels.cuda import ops as cuda_ops  # noqa: E402
from fxc_kernels.cuda.sparse24_prepacked import prepack  # noqa: E402

PASSES = ("int8", "int8:mode=weight_only", "fp8", "fp8:mode=weight_only", "int4:group=32", "sparse24", "sparse24,int8")
# Of the result's norm: float32 sums in another order; bfloat16 roundings at other places, through two layers.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}


def compiled(family: str, passes: str, dtype=torch.float32):
    model, inputs = build(family)
    return optimize(model.to(dtype), inputs, passes=passes, verify=False, budget=9, layer_budget=9).program


def program_of(model: nn.Module, x: torch.Tensor, passes: str = "int8"):
    return optimize(model.eval(), (x,), passes=passes, verify=False, budget=9, layer_budget=9).program


def calls(module) -> Counter:
    names = (str(node.target) for node in module.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("fxc_cuda."))


def errors(module, program) -> float:
    """The largest error of `module` against the unlowered program, of each result's norm, at two sizes."""
    worst = 0.0
    for inputs in samples(program)[:2]:
        for got, expected in zip(module(*inputs), program.module()(*inputs), strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            if expected.is_floating_point():
                norm = expected.double().norm().clamp(min=1e-6)
                worst = max(worst, ((got.double() - expected.double()).norm() / norm).item())
    return worst


CASES = [
    *(("qwen2", torch.float32, passes) for passes in PASSES),
    *(("gemma2", torch.bfloat16, passes) for passes in ("int8", "int4:group=32", "sparse24")),
    *(("bert", torch.float32, passes) for passes in ("fp8", "sparse24,int8")),
]


@pytest.mark.parametrize(("family", "dtype", "passes"), CASES, ids=[f"{family} {passes}" for family, _, passes in CASES])
def test_lowered_graphs_compute_the_program(family, dtype, passes):
    program = compiled(family, passes, dtype)
    module, report = for_cuda(program, capability=90)
    assert errors(module, program) < TOLERANCE[dtype]
    assert not any("fxc::" in str(node.target) or str(node.target).startswith("fxc.") for node in module.graph.nodes)
    assert report and all(each.op.startswith("triton ") for each in report)
    assert all("was not measured" in each.reason for each in report)


def test_a_decoder_layer_is_four_products_and_its_norms_quantize():
    module, report = for_cuda(compiled("qwen2", "int8"), capability=90)
    # Two layers of qkv, o, gate and up, down, and the head.
    assert calls(module) == Counter(int8_mm=9, rms_norm_int8=1, add_rms_norm_int8=4, quantize_int8=4, rope=4)
    activations = Counter(node.args[-1] for node in module.graph.nodes if str(node.target) == "fxc_cuda.int8_mm.default")
    assert activations == Counter(none=7, silu_mul=2)
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)[1:]
    q = next(each for each in report if each.fqn.endswith("0.self_attn.q_proj"))
    assert "one product with" in q.reason and "k_proj" in q.reason and "v_proj" in q.reason


def test_weight_only_decoders_have_their_norms_and_rotations_fused():
    program = compiled("qwen3", "int4:group=32")
    module, _ = for_cuda(program)
    # Of each layer two norms of the residual stream and two of queries and keys.
    assert calls(module) == Counter(int4_linear=9, rms_norm=5, add_rms_norm=4, rope=4)
    assert errors(module, program) < 2e-4


class Turned(nn.Module):
    """Rotations that look like one and are not: the other half negated, tables of another width, x and y mixed."""

    def forward(self, x, y, cos, sin):
        first, second = x[..., :4], x[..., 4:]
        right = x * cos + torch.cat([-second, first], -1) * sin
        negated = x * cos + torch.cat([second, -first], -1) * sin
        mixed = y * cos + torch.cat([-second, first], -1) * sin
        uneven = x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin
        return right, negated, mixed, uneven


def test_only_rotations_become_rotations():
    shape, table = (2, 3, 5, 8), (2, 1, 5, 8)
    given = (torch.randn(shape), torch.randn(shape), torch.randn(table), torch.randn(table))
    free = dict.fromkeys(('x', 'y', 'cos', 'sin'), (0, 2))  # the width of a head is a number, as where weights make it
    program = optimize(Turned(), given, passes="", verify=False, dynamic_shapes=free).program
    module, _ = for_cuda(program)
    assert calls(module) == Counter(rope=1)
    assert errors(module, program) < 1e-6


def test_a_double_is_not_turned_in_float32():
    given = tuple(torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (3, 3, 1, 1))
    module, _ = for_cuda(optimize(Turned(), given, passes="", verify=False).program)
    assert not calls(module)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile"])
def test_layers_may_be_called_what_a_graph_module_has(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(32, 24))
    program = program_of(model, torch.randn(3, 32), passes="")
    for module, _ in (for_cuda(program), on_cpu(program)):
        assert errors(module, program) < 1e-6


def test_a_model_stays_on_the_device_that_was_current(monkeypatch):
    model = optimize(nn.Sequential(nn.Linear(32, 24)).eval(), (torch.randn(3, 32),), passes="", verify=False)
    model._device, used = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("fxc.compiled.model.lower", lambda program, device, *rest: (used.append(device), (program, []))[1])
    monkeypatch.setattr("fxc.compiled.model.runnable", lambda *lowered: nn.Identity())
    model.lower()
    assert used == [model.device] == [torch.device("cuda:1")]


class Shared(nn.Module):
    """Two int8 layers over one norm, which something else reads too, and an activation that is read twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)
        self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)

    def forward(self, x):
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = torch.nn.functional.silu(self.a(normed))
        return gate * self.b(normed), gate, normed


def test_what_others_read_stays_in_the_graph():
    program = program_of(Shared(), torch.randn(3, 32))
    module, _ = for_cuda(program)
    # The norm stays a float, as one operator; gate is read twice, so only the product is shared.
    assert calls(module) == Counter(rms_norm=1, quantize_int8=1, int8_mm=1)
    assert errors(module, program) < 2e-4


class Mixed(nn.Module):
    """gelu after one layer; up before gate, with a bias on one of them; relu, which no kernel has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 24), nn.Linear(40, 32)
        self.up, self.gate = nn.Linear(24, 40), nn.Linear(24, 40, bias=False)

    def forward(self, x):
        x = torch.nn.functional.gelu(self.first(x), approximate="tanh")
        return self.last(self.up(x) * torch.nn.functional.silu(self.gate(x))).relu()


@pytest.mark.parametrize("passes", ["int8", "fp8", "fp8:mode=weight_only"])
def test_activations_move_into_products(passes):
    program = program_of(Mixed(), torch.randn(5, 32), passes)
    module, _ = for_cuda(program, capability=89)
    products = [node.args[-1] for node in module.graph.nodes if str(node.target).endswith(("_mm.default", "linear.default"))]
    assert products == ["gelu_tanh", "silu_mul", "none"]
    assert errors(module, program) < 2e-4


@pytest.mark.slow
def test_the_same_graph_compiles():
    program = compiled("qwen2", "int8")
    module, _ = for_cuda(program, "inductor", capability=90)
    assert errors(module, program) < 2e-4


def test_torch_compile_takes_a_lowered_graph_whole():
    program = program_of(Mixed(), torch.randn(5, 32))
    module, _ = for_cuda(program, capability=90)
    whole = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 1, 9):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(whole(x)[0], module(x)[0])


def test_float8_products_are_refused_where_the_chip_has_none():
    program = compiled("bert", "fp8")
    with pytest.raises(UsageError) as refused:
        for_cuda(program, capability=80)
    assert "compute capability 8.0" in str(refused.value) and "attention" in str(refused.value.where)
    assert "fp8:mode=weight_only" in refused.value.hint
    for_cuda(compiled("bert", "fp8:mode=weight_only"), capability=80)


def entries(*measured):
    return {"chip": "cpu", "versions": {}, "entries": [
        dict(zip(("scheme", "n", "k", "m", "config", "us", "dense_us"), each)) for each in measured
    ]}  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that makes a table the one of this machine."""
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)

    def write(*measured):
        (tmp_path / "cpu.json").write_text(json.dumps(entries(*measured)))
        dispatch.table.cache_clear()
        dispatch.measurement_for.cache_clear()

    yield write
    monkeypatch.undo()
    dispatch.table.cache_clear()
    dispatch.measurement_for.cache_clear()


def test_a_layer_that_was_measured_to_be_slower_stays_dense(table):
    table(("int8", 128, 64, 1, None, 30.0, 10.0), ("int8", 128, 64, 16, None, 20.0, 25.0))
    program = compiled("bert", "int8", torch.bfloat16)
    module, report = for_cuda(program)
    slow = [each for each in report if (each.out_features, each.in_features) == (128, 64)]
    assert {each.op for each in slow} == {"dequantized"} and all("M=1: 0.33x, M=16: 1.25x" in each.reason for each in slow)
    assert {each.op for each in report} == {"dequantized", "triton int8"}
    assert errors(module, program) < 0.1  # the dense product does not quantize what it reads
    _, report = for_cuda(program, compressed=True)
    assert {each.op for each in report} == {"triton int8"}
    _, report = for_cuda(compiled("bert", "int8"))
    assert {each.op for each in report} == {"triton int8"} and any("not measured in float32" in each.reason for each in report)


def test_the_table_chooses_the_configuration(table):
    from fxc_kernels.cuda import scaled_mm

    table(
        ("int8", 96, 64, 1, "16x32x128 w2 s3 split 2", 1.0, 2.0),
        ("int8", 96, 64, 16, "16x64x64 w8 s2", 1.0, 2.0),
        ("int8", 96, 64, 256, "128x64x64 w4 s3", 1.0, 2.0),
        ("sparse24", 96, 64, 1, None, 1.0, 2.0),
    )

    def chosen(scheme, rows, outputs=96, dtype=torch.bfloat16):
        return str(dispatch.config_for(scheme, torch.empty(rows, 64, dtype=dtype), outputs, 64, scaled_mm.CONFIGS))

    assert chosen("int8", 1) == "16x32x128 w2 s3 split 2"
    assert chosen("int8", 1, dtype=torch.float32) == str(dispatch.choose(scaled_mm.CONFIGS, 80, 1, 96))
    assert chosen("int8", 2) == chosen("int8", 16) == "16x64x64 w8 s2"
    assert chosen("int8", 65) == "128x64x64 w4 s3"
    assert chosen("int8", 17) == str(dispatch.choose(scaled_mm.CONFIGS, 80, 17)), "another kernel's"
    assert chosen("int8", 1, outputs=97) == chosen("sparse24", 1) == str(dispatch.choose(scaled_mm.CONFIGS, 80, 1))
    table(("int9", 96, 64, 1, None, 1.0, 2.0))
    with pytest.raises(ValueError, match="which is none of int8, fp8"):
        chosen("int8", 1)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("int8", 8, 8, 1, "16x32 w2 s3", 1.0, 2.0), "is no configuration: write"),
        (("int8", 8, 8, 1, "16x48x64 w2 s3", 1.0, 2.0), "powers of two"),
        (("int8", 8, 8, 1, "16x32x64 w4 s3 split 0", 1.0, 2.0), "nothing is 0"),
        (("int8", 8, 8, 1, "1x32x64 w4 s3", 1.0, 2.0), "tiles are of 16 x 16 x 32"),
        (("int8_weight_only", 8, 8, 16, "4x8x512 w4 s2", 1.0, 2.0), "it multiplies up to 4"),
        (("int4_g32", 8, 8, 1, "1x8x16 w4 s2", 1.0, 2.0), "k is 32 or more"),
        (("sparse24", 8, 8, 1, "8x64x64 w1 s2", 1.0, 2.0), "a warp for each 32"),
        (("int8", 8, 8, 1, None, 0, 2.0), "took 0 us"),
        (("int8", 8, 8, 1, None, None, 2.0), "not supported between"),
    ],
)
def test_a_table_that_no_kernel_can_follow_is_refused(table, entry, says):
    table(entry)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        for_cuda(program_of(nn.Linear(32, 24), torch.randn(3, 32)))
    assert says in str(caught.value.why) and "cpu.json" in str(caught.value.why)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"entries": [{"scheme": "int8"}]}'])
def test_a_file_that_is_no_table_is_refused(table, text):
    table()
    (dispatch.TABLES / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json is no table of measurements"):
        dispatch.measured("cpu", "int8", 8, 8)


DENSE = torch.randn(6, 8, 4) * torch.tensor([0, 1, 0, 1])
SPARSE = sparse24.pack(DENSE.flatten(1).bfloat16())
PREPACKED, PREPACKED_INT8 = prepack(*SPARSE), prepack(*sparse24.pack((20 * DENSE.flatten(1)).to(torch.int8)))
X, ROW = torch.randn(2, 3, 32), torch.randn(32)
INT8 = torch.randint(-127, 128, (6, 32), dtype=torch.int8)
SCALE = torch.rand(6)
SAMPLES = {
    "quantize_int8": (X,),
    "quantize_fp8": (X.bfloat16(),),
    "rms_norm_int8": (X, ROW, 1e-6),
    "rms_norm_fp8": (X, ROW, 1e-6),
    "add_rms_norm_int8": (X, X + 1, ROW, 1e-6),
    "add_rms_norm_fp8": (X, X + 1, ROW, 1e-6),
    "rms_norm": (X, ROW, 1e-6),
    "add_rms_norm": (X, X + 1, ROW, 1e-6),
    "rope": (X[:, None], X[:1, None], X[:1, None] + 1),
    "int8_mm": (*cuda_ops.quantize_int8(X), INT8, SCALE, INT8.sum(1, dtype=torch.int32), None, torch.float16, "silu_mul"),
    "fp8_mm": (*cuda_ops.quantize_fp8(X), INT8.to(torch.float8_e4m3fn), SCALE, SCALE, torch.float32, "gelu"),
    "weight_only_linear": (X, INT8, SCALE, SCALE, "silu_mul"),
    "sparse24_linear": (X.bfloat16(), PREPACKED.values, PREPACKED.meta, 6, None, "gelu_tanh"),
    "sparse24_linear_float32": (X, SPARSE[0].float(), SPARSE[1], SCALE, "none"),
    "int8_sparse24_mm": (
        *cuda_ops.quantize_int8(X), PREPACKED_INT8.values, PREPACKED_INT8.meta, 6, SCALE, torch.zeros(6, dtype=torch.int32),
        SCALE, torch.bfloat16, "none",
    ),
    "int4_linear": (X, INT8[:, :16].view(torch.uint8), torch.rand(6, 1), None, None, 32, "silu"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_say_what_they_give(name):
    # opcheck's look for written arguments adds to them, which float8 numbers cannot do.
    checks = ("test_faketensor", "test_aot_dispatch_dynamic") + (("test_schema",) if name != "fp8_mm" else ())
    torch.library.opcheck(getattr(torch.ops.fxc_cuda, name).default, SAMPLES[name], test_utils=checks)




@needs_interpreter
@pytest.mark.parametrize(
    "cases",
    [
        ("int4:group=32", "bfloat16", "int8", "float32"),
        pytest.param(
            ("int8:mode=weight_only", "float32", "sparse24", "bfloat16", "sparse24,int8", "float32"), marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_a_whole_model_through_the_kernels(cases):
    """(passes, dtype, ...), one after the other in one process, which begins with importing torch and Triton."""
    script = REPO / "tests" / "helpers" / "lowered_interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script, *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
