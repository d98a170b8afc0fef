"""A weight format that this file makes up, of one scheme and one pass, is known everywhere: nothing of fxc names a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from command import fxc as command
from command import fxc_json
from pass_text import program_of
from tiny import save
from torch import Tensor, nn

import fxc
from fxc.analysis import sizes
from fxc.data.decoder import decoder_inputs
from fxc.errors import InputRefused, UsageError
from fxc.ir import parse_program, print_program
from fxc.ir.names import parts_of
from fxc.kernel_bench import cpu
from fxc.kernel_bench.limits import weight_bytes
from fxc.kernel_bench.shapes import Shape
from fxc.kernel_bench.weights import all_schemes, make
from fxc.passes.base import Context, Pass
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.float64 import in_float64
from fxc.passes.linears import PackLinears
from fxc.report.lowering import describe
from fxc.schemes.checks import check_weight
from fxc.schemes.scheme import SCHEMES, Product, Scheme, product_of, products_for, register, scheme_of, unregister

BITS = 2 ** torch.arange(8, dtype=torch.uint8)
LAYERS = {f"model.layers.{n}.{name}" for n in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)} | {"lm_head"}  # fmt: skip


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K], 8 a divisor of K -> (signs uint8 [N, K/8], scale float32 [N], the mean magnitude of a row)."""
    check_weight(weight, "binary")
    signs = (weight >= 0).unflatten(1, (-1, 8)).to(torch.uint8).mul(BITS).sum(-1, dtype=torch.uint8)
    return signs, weight.float().abs().mean(1).clamp(min=1e-12)


def dequantize(signs: Tensor, scale: Tensor) -> Tensor:
    return torch.where((signs[..., None] & BITS) != 0, 1.0, -1.0).flatten(1) * scale[:, None]


def product(x: Tensor, signs: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x.float(), dequantize(signs, scale), None if bias is None else bias.float()).to(x.dtype)


@pytest.fixture(scope="module", autouse=True)
def binary():
    """The format, its operator and its pass, for the tests of this file."""
    known, passes = dict(SCHEMES), dict(Pass.registry)
    with torch.library._scoped_library("fxc", "FRAGMENT") as library:
        library.define("binary_linear(Tensor x, Tensor signs, Tensor scale, Tensor? bias) -> Tensor")
        library.impl("binary_linear", product, "CompositeExplicitAutograd")
        fake = lambda x, signs, scale, bias: x.new_empty(*x.shape[:-1], signs.shape[0])  # noqa: E731
        torch.library.register_fake("fxc::binary_linear", fake, lib=library)
        operator = torch.ops.fxc.binary_linear.default
        made = register(
            Scheme(
                name="binary",
                label="binary",
                parts={"signs": None, "scale": "scales"},
                products=(Product(operator, "binary", "binary linear"),),
                quantize=quantize,
                dequantize=dequantize,
            )
        )

        @dataclass(frozen=True)
        class Binary(PackLinears):
            """Keep the signs of the weights of linear layers, and one scale for each output channel."""

            name: ClassVar[str] = "binary"
            needs: ClassVar = frozenset({CANONICAL, FLOAT_WEIGHTS, DENSE_WEIGHTS})
            breaks: ClassVar = frozenset({FLOAT_WEIGHTS})
            limits: ClassVar = (float("inf"), float("inf"))
            scheme: ClassVar = made

        yield made
        unregister(made)
    del Pass.registry["binary"]
    assert known == SCHEMES and Pass.registry == passes and scheme_of(operator) is None
    assert operator not in products_for(torch.ops.aten.linear.default)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, binary):
    root = tmp_path_factory.mktemp("binary")
    save("qwen2", root / "model")
    (root / "text.txt").write_text("def answer(question):\n    return 42 if question else None\n\n" * 4)
    command("compile", root / "model", "-o", root / "packed", "--passes", "binary")
    return root


def test_its_record_packs_and_dequantizes(binary):
    weight = torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, -8], [0, 0, 0, 0, 0, 0, 0, -8]])
    parts = binary.pack(weight)
    assert parts["signs"].tolist() == [[0b01010101], [0b01111111]] and parts["scale"].tolist() == [4.5, 1.0]
    assert binary.fake(weight).tolist() == [[4.5, -4.5] * 4, [1.0] * 7 + [-1.0]]
    experts = torch.stack([weight, -weight]).bfloat16()
    assert {part: list(t.shape) for part, t in binary.pack(experts).items()} == {"signs": [2, 2, 1], "scale": [2, 2]}
    assert torch.equal(binary.fake(experts)[0], binary.fake(weight.bfloat16())) and binary.fake(experts).dtype == torch.bfloat16
    planned = binary.pack(experts.to("meta"))
    assert {part: (t.shape, t.dtype, t.is_meta) for part, t in planned.items()} == {
        part: (t.shape, t.dtype, True) for part, t in binary.pack(experts).items()
    }
    with pytest.raises(InputRefused, match="binary cannot express"):
        binary.pack(weight / 0)


def test_its_name_and_its_operators_are_its_own(binary):
    with pytest.raises(ValueError, match="binary"):
        register(binary)
    again = Scheme("other", "other", binary.parts, binary.products, quantize, dequantize)
    with pytest.raises(ValueError, match="operators"):
        register(again)
    assert SCHEMES.keys() >= {"binary", "int8"} and "other" not in SCHEMES
    assert product_of(binary.products[0].operator).why_not(80) is None


def test_a_model_becomes_it_is_saved_loaded_and_lowered(folder, binary):
    model = fxc.load(folder / "packed")
    packed = [node for node in model.program.graph.nodes if scheme_of(node.target) is binary]
    assert {parts_of(node)["signs"].removesuffix(".signs") for node in packed} == LAYERS
    again = parse_program(print_program(model.program), model.program.constants)
    assert print_program(again) == print_program(model.program)
    assert in_float64(model.program) is None and "quantized" in FLOAT_WEIGHTS.check(model.program)
    assert DENSE_WEIGHTS.check(model.program) is None
    model.lower()
    assert {choice.fqn for choice in model.layers} == LAYERS
    assert {choice.op for choice in model.layers} == {"dequantized"}
    assert all(choice.reason.startswith("dequantized: no CPU kernel for binary") for choice in model.layers)
    assert any("one product with" in choice.reason for choice in model.layers)
    assert sum("no CPU kernel for binary" in line for line in describe(model.layers)) == 1
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        (expected, *_) = model.program.module()(*decoder_inputs(model.program, ids))
        assert (model(input_ids=ids).logits - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_it_is_named_in_sizes_reports_and_comparisons(folder, binary):
    model = fxc.load(folder / "packed")
    kinds = sizes.bytes_by_kind(model.program)
    assert kinds["binary linear"] * 8 == sum(  # one bit for each number
        t.numel() * 8 for node in model.program.graph.nodes for part, fqn in parts_of(node).items() if part == "signs"
        for t in [model.program.constants[fqn]]
    )  # fmt: skip
    assert "scales" in kinds and {each.name for each in sizes.layers(model.program) if each.kind == "binary linear"} >= LAYERS
    shown = fxc_json("inspect", folder / "packed")
    assert shown["bytes_by_kind"]["binary linear"] == kinds["binary linear"]
    assert shown["operators"]["fxc.binary_linear"] == len(LAYERS)
    told = command("compile", folder / "model", "-o", folder / "again", "--passes", "binary", "--report").stdout
    assert "binary linear" in told
    assert "no CPU kernel for binary" in command("run", folder / "packed", "--prompt", "import", "--max-new-tokens", 1).output
    found = fxc_json("eval", folder / "packed", "--against", folder / "model", "--text", folder / "text.txt", "--window", 64)
    assert {each["name"] for each in found["layers"] if each["own"] > 0} == LAYERS
    with pytest.raises(UsageError, match="compile without binary weights"):
        model.export_hugging_face(folder / "plain")


def test_its_product_is_benchmarked():
    assert "binary" in all_schemes() and weight_bytes("binary", 64, 256) == 64 * (256 / 8 + 4)
    (ours,) = (each for each in cpu.contenders(("binary",)) if each.ours)
    weights, x = make("binary", Shape("x", 64, 256)), torch.randn(5, 256, dtype=torch.bfloat16)
    bound = ours.build(weights)
    rows, expected = weights.reference(x)
    assert bound.form == "dequantized" and (bound(x)().float()[rows] - expected).norm() < 1e-2 * expected.norm()


class Named(nn.Module):
    """A layer that is called like the format, and one that has something of a part's name already."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"binary": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
        self.inner["other"].register_parameter("signs", nn.Parameter(torch.ones(32)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.inner["binary"](x)) * self.inner["other"].signs


def test_layers_keep_their_names():
    made = fxc.optimize(Named(), (torch.randn(4, 32),), "binary")
    assert {"inner.binary.binary.signs", "inner.other.binary.signs", "inner.other.signs"} <= made.program.constants.keys()
    made.lower()
    assert {choice.fqn for choice in made.layers} == {"inner.binary", "inner.other"}
    assert set(made.report["passes"][-1]["layer_errors"]) == {"inner.binary", "inner.other"}


def test_experts_are_declined_with_who_takes_them():
    program = program_of("""constant @experts.weight: f32[2, 16, 32]
%0: f32[s0, 32] = input "x"
%1: i32[2] = input "offsets"
%2: f32[s0, 16] = fxc.grouped_linear(%0, @experts.weight, %1)
return "out" %2""")
    result = Pass.registry["binary"]().run(program, Context())
    assert [(r.fqn, r.reason) for r in result.refusals] == [
        ("experts", "there is no binary form of the experts of a mixture: int8 has one")
    ]
