"""Perplexity, agreement and latency, against what can be computed by hand."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from families import build
from tiny import byte_tokenizer

import fxc
from fxc.captured import Captured, capture_source
from fxc.compiler import compile_captured
from fxc.data.comparison import inputs_for
from fxc.errors import UsageError, VerificationFailed
from fxc.measure import bench, evaluate
from fxc.options import Options
from fxc.report import sizes
from fxc.report.difference import unified_diff


class Bigrams(torch.nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=64)
        self.rows: list[int] = []

    def forward(self, input_ids, use_cache=None):
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_is_that_of_every_token_but_a_windows_first():
    torch.manual_seed(0)
    model, tokens = Bigrams(torch.randn(11, 11)), torch.randint(0, 11, (53,))
    losses = []
    for start in range(0, 53, 8):
        for at in range(start + 1, min(start + 8, 53)):
            losses.append(-model.table[tokens[at - 1]].log_softmax(-1)[tokens[at]].item())
    found = evaluate.perplexity(model, tokens, 8)
    assert found.tokens == len(losses) == sum(found.counts)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert max(model.rows) > 1, "full windows go through the model together"


def test_perplexity_refuses_what_it_cannot_measure():
    model = Bigrams(torch.zeros(11, 11))
    for tokens, window in ((torch.tensor([1]), 8), (torch.tensor([1, 11]), 8), (torch.ones(9).long(), 65)):
        with pytest.raises(UsageError):
            evaluate.perplexity(model, tokens, window)
    with pytest.raises(VerificationFailed, match="nan"):
        evaluate.perplexity(Bigrams(torch.full((11, 11), torch.nan)), torch.ones(9).long(), 8)


def test_change_is_paired():
    before = evaluate.Perplexity(0, 20, 11, [10.0, 30.0], [10, 10])
    same_shift = evaluate.Perplexity(0, 20, 11, [11.0, 31.0], [10, 10])
    relative, error = evaluate.change(before, same_shift)
    assert relative == pytest.approx(math.exp(0.1) - 1)
    assert error == pytest.approx(0, abs=1e-9)
    _, error = evaluate.change(before, evaluate.Perplexity(0, 20, 11, [11.0, 30.0], [10, 10]))
    assert error == pytest.approx(0.05)
    one = evaluate.Perplexity(0, 10, 11, [10.0], [10])
    assert evaluate.change(one, one) == (0.0, None)


@pytest.fixture(scope="module")
def pair():
    """A tiny Qwen2 as it is and with int8 layers."""
    model, _ = build("qwen2")
    return fxc.optimize(model, passes=""), fxc.optimize(model, passes="int8", skip=["*.o_proj"])


def test_a_model_agrees_with_itself_and_less_with_its_int8_form(pair):
    original, packed = pair
    inputs, _ = inputs_for(original.program, byte_tokenizer(), "def f(x): return x + 1\n" * 4, 32, 2)
    assert [len(tensors) for tensors in inputs] == [len(original.program.placeholders)] * 2
    itself = evaluate.agreement(original, original, inputs)
    assert itself["relative_error"] == 0 and itself["next_token"] == 1 and itself["kl"] == pytest.approx(0, abs=1e-6)
    other = evaluate.agreement(packed, original, inputs)
    assert 1e-4 < other["relative_error"] < 0.1 and 0.8 < other["next_token"] <= 1 and 0 <= other["kl"] < 1e-2


def test_layers_are_paired_by_name_and_blamed_for_their_own_error(pair):
    original, packed = pair
    inputs, _ = inputs_for(original.program, byte_tokenizer(), "import os\n" * 8, 32, 1)
    layers = {each.name: each for each in evaluate.layer_agreement(packed.program, original.program, inputs)}
    kept, made = layers["model.layers.0.self_attn.o_proj"], layers["model.layers.0.mlp.down_proj"]
    assert kept.own == 0 and kept.accumulated > 0, "a layer that was left alone passes on errors and makes none"
    assert 1e-4 < made.own < 0.05
    assert layers["model.embed_tokens"].accumulated == 0
    damaged = packed.program.copy()
    damaged.constants["model.layers.1.mlp.up_proj.scale"] = packed.program.constants["model.layers.1.mlp.up_proj.scale"] * 2
    assert evaluate.layer_agreement(damaged, original.program, inputs)[0].name == "model.layers.1.mlp.up_proj"


@functools.cache
def captured(family: str) -> Captured:
    return capture_source(build(family)[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    "spec",
    ["int8", "int8:mode=weight_only", "int4:group=32", "fp8", "fp8:mode=weight_only", "sparse24", "sparse24,int8"],
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
    layers = {each.name: each for each in evaluate.layer_agreement(made.program, original, inputs)}
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
    layers = {each.name: each for each in evaluate.layer_agreement(made.program, original.program, [list(inputs)])}
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
    found = evaluate.agreement(packed, original, inputs)
    assert found["cosine_min"] > 0.99 and found["same_label"] == 1
    inputs, of = inputs_for(original.program, None, None, 256, None)
    assert of == "made-up inputs" and evaluate.agreement(original, original, inputs)["cosine_min"] == pytest.approx(1)
    with pytest.raises(UsageError, match="same model"):
        evaluate.agreement(packed, pair[0], inputs)


def test_bench_times_every_phase_of_every_entry(pair):
    original, packed = pair
    entries = [bench.Entry(n, "here", m, m.program, m.program.nbytes()) for n, m in (("a", original), ("b", packed))]
    rows = bench.race(entries, [1, 2], [4], new=2, rounds=2)
    assert [(r.entry.name, r.batch, r.seq) for r in rows] == [("a", 1, 4), ("b", 1, 4), ("a", 2, 4), ("b", 2, 4)]
    assert all(len(r.milliseconds[p]) == 2 and min(r.milliseconds[p]) > 0 for r in rows for p in ("prefill", "decode"))
    assert rows[0].speedup("decode", rows[0]) == 1
    with pytest.raises(UsageError, match="at most 256"):
        bench.race(entries, [1], [255], new=2)


def test_a_difference_ignores_numbers_and_sees_rewiring():
    before = "%0: f32[2] = input\n%1: f32[2] = aten.neg(%0)\n%2: f32[2] = aten.abs(%1)\nreturn %2"
    longer = "%0: f32[2] = input\n%1: f32[2] = aten.exp(%0)\n%2: f32[2] = aten.neg(%0)\n%3: f32[2] = aten.abs(%2)\nreturn %3"
    assert unified_diff(before, before, ("a", "b")) == ""
    changed = [line for line in unified_diff(before, longer, ("a", "b")).splitlines()[2:] if line[0] in "+-"]
    assert changed == ["+%+0: f32[2] = aten.exp(%0)"]
    rewired = before.replace("aten.abs(%1)", "aten.abs(%0)")
    changed = [line for line in unified_diff(before, rewired, ("a", "b")).splitlines()[2:] if line[0] in "+-"]
    assert changed == ["-%2: f32[2] = aten.abs(%1)", "+%2: f32[2] = aten.abs(%0)"]
