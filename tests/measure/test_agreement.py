"""Agreement at the output and layer by layer: of a model with itself, with its int8 form, with one that was damaged."""

import functools

import pytest
import torch
from families import build
from tiny import byte_tokenizer

import fxc
from fxc.analysis import sizes
from fxc.captured import Captured, capture_source
from fxc.compiler import compile_captured
from fxc.data.comparison import inputs_for
from fxc.errors import UsageError
from fxc.measure.agreement import agreement, compare_layers, layer_agreement
from fxc.options import Options


def test_a_model_agrees_with_itself_and_less_with_its_int8_form(pair):
    original, packed = pair
    inputs, _ = inputs_for(original.program, byte_tokenizer(), "def f(x): return x + 1\n" * 4, 32, 2)
    assert [len(tensors) for tensors in inputs] == [len(original.program.placeholders)] * 2
    itself = agreement(original, original, inputs)
    assert itself["relative_error"] == 0 and itself["next_token"] == 1 and itself["kl"] == pytest.approx(0, abs=1e-6)
    other = agreement(packed, original, inputs)
    assert 1e-4 < other["relative_error"] < 0.1 and 0.8 < other["next_token"] <= 1 and 0 <= other["kl"] < 1e-2


def test_layers_are_paired_by_name_and_blamed_for_their_own_error(pair):
    original, packed = pair
    inputs, _ = inputs_for(original.program, byte_tokenizer(), "import os\n" * 8, 32, 1)
    layers = {each.name: each for each in layer_agreement(packed.program, original.program, inputs)}
    kept, made = layers["model.layers.0.self_attn.o_proj"], layers["model.layers.0.mlp.down_proj"]
    assert kept.own == 0 and kept.accumulated > 0, "a layer that was left alone passes on errors and makes none"
    assert 1e-4 < made.own < 0.05
    assert layers["model.embed_tokens"].accumulated == 0
    damaged = packed.program.copy()
    damaged.constants["model.layers.1.mlp.up_proj.scale"] = packed.program.constants["model.layers.1.mlp.up_proj.scale"] * 2
    assert layer_agreement(damaged, original.program, inputs)[0].name == "model.layers.1.mlp.up_proj"


def test_two_programs_part_at_the_first_layer_that_was_changed(pair):
    original, _ = pair
    inputs, _ = inputs_for(original.program, byte_tokenizer(), "import os\n" * 8, 32, 1)
    _, same = compare_layers(original.program, original.program.copy(), inputs)
    assert same.bits is None and same.beyond is None and same.gone == same.new == []
    damaged = original.program.copy()
    last, middle = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    for layer, by in ((middle, 1e-5), (last, 1.0)):
        weight = damaged.constants[f"{layer}.weight"]
        damaged.constants[f"{layer}.weight"] = weight * (1 + by)
    layers, found = compare_layers(damaged, original.program, inputs, 0.1)
    assert (found.bits.name, found.beyond.name) == (middle, last)
    assert 0 < found.bits.accumulated < 1e-4 and found.beyond.own == pytest.approx(1, rel=1e-3)
    places = {each.name: each for each in layers}
    assert all(each.identical == (each.place < places[middle].place) for each in layers)
    assert compare_layers(damaged, original.program, inputs, 0.0)[1].beyond.name == middle


def test_parting_names_the_layers_that_one_alone_has_and_a_layer_of_another_shape():
    wide = fxc.capture(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))), (torch.ones(2, 8),), check=False)
    narrow = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(5, 8))
    narrow.add_module("other", torch.nn.Linear(8, 8))
    found = compare_layers(fxc.capture(narrow, (torch.ones(2, 8),), check=False), wide, [[torch.randn(2, 8)]])[1]
    assert found.gone == ["2"] and found.new == ["other"]
    assert found.bits.name == found.beyond.name == "0" and found.beyond.accumulated == float("inf")


@functools.cache
def captured(family: str) -> Captured:
    return capture_source(build(family)[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    "spec",
    ["int8", "int4:group=32", "sparse24,int8", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fp8", "sparse24"))],
)
def test_every_compressed_layer_is_compared_by_its_name(family, spec):
    model, _ = build(family)
    original = captured(family).program
    made = compile_captured(captured(family), Options(spec, budget=9.0, layer_budget=9.0))
    experts = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 3}
    every = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} | experts
    step = made.report["passes"][-1]
    packed = every - {refusal["fqn"] for refusal in step["refusals"]}
    assert len(packed) == step["changed"] > 5
    assert not experts & packed or spec.endswith("int8")
    assert experts <= packed or not spec.endswith("int8")
    inputs, _ = inputs_for(original, byte_tokenizer(), "import os\n" * 8, 32, 1)
    layers = {each.name: each for each in layer_agreement(made.program, original, inputs)}
    assert {name for name, each in layers.items() if each.own > 0} == packed
    assert set(step["layer_errors"]) == packed
    assert packed <= {each.name for each in sizes.layers(made.program)}


class Named(torch.nn.Module):
    """Weights that are called like what stands for packed ones, and a module like a pass."""

    def __init__(self):
        super().__init__()
        self.values, self.scale = (torch.nn.Parameter(torch.randn(32, 32)) for _ in range(2))
        self.inner = torch.nn.ModuleDict({"int8": torch.nn.Linear(32, 32), "fp8": torch.nn.Linear(32, 32)})
        self.own = torch.nn.Linear(32, 32)
        self.own.register_parameter("qweight", torch.nn.Parameter(torch.rand(32)))

    def forward(self, x):
        linear = torch.nn.functional.linear
        x = self.inner["fp8"](self.inner["int8"](linear(linear(x, self.values), self.scale)))
        return self.own(x) * self.own.qweight


@pytest.mark.parametrize("spec", ["int8", "sparse24", "sparse24,int8"])
def test_layers_with_unlucky_names_are_compared_too(spec):
    inputs = (torch.randn(4, 32),)
    original = fxc.optimize(Named(), inputs, "")
    made = fxc.optimize(Named(), inputs, spec, budget=9.0, layer_budget=9.0)
    layers = {each.name: each for each in layer_agreement(made.program, original.program, [list(inputs)])}
    names = {"values", "scale", "inner.int8", "inner.fp8", "own"}
    assert set(layers) == names and all(each.own > 0 for each in layers.values())
    assert {each.name for each in sizes.layers(made.program)} == names
    assert set(made.report["passes"][-1]["layer_errors"]) == names
    made.lower()
    assert {choice.fqn for choice in made.layers} == names


def test_encoders_and_vision_models_are_compared_too(pair):
    model, _ = build("bert")
    original, packed = fxc.optimize(model, passes=""), fxc.optimize(model, passes="int8")
    inputs, of = inputs_for(original.program, byte_tokenizer(), "one line\n\nand another\n", 256, None)
    assert of == "2 lines of text"
    found = agreement(packed, original, inputs)
    assert found["cosine_min"] > 0.99 and found["same_label"] == 1
    inputs, of = inputs_for(original.program, None, None, 256, None)
    assert of == "made-up inputs" and agreement(original, original, inputs)["cosine_min"] == pytest.approx(1)
    with pytest.raises(UsageError, match="same model"):
        agreement(packed, pair[0], inputs)
