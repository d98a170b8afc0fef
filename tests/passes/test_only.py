"""Formats that are for some layers, and facts that hold layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from families import Mlp, build

import fxc
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.parse import parse_program
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.facts import FLOAT_WEIGHTS
from fxc.passes.int8 import Int8
from fxc.passes.order import order
from fxc.pipeline import run_passes
from fxc.report.compilation import coverage_text


def mlp():
    torch.manual_seed(0)
    model = Mlp()
    model.up, model.down, model.head = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64), torch.nn.Linear(64, 32)
    return fxc.capture(model, (torch.randn(2, 64),))


def formats(program) -> dict[str, str]:
    """Layer -> which of fxc's operators it is, "linear" where it is none."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    return {n.meta["fqn"]: str(n.target).split(".")[1].replace("_linear", "") for n in calls}


def test_one_format_for_some_layers_and_another_for_the_rest(tmp_path):
    model, _ = build("qwen2")
    ids = torch.arange(14).view(2, 7)
    small = fxc.optimize(model, passes="int4:only='re:.*mlp.*':group=32,int8")
    made = formats(small.program)
    assert {kind for fqn, kind in made.items() if ".mlp." in fqn} == {"int4_weight_only"}
    assert {kind for fqn, kind in made.items() if ".mlp." not in fqn} == {"int8"}
    assert len(made) == 15
    _, first, second = small.report["passes"]
    assert first["name"] == "int4:group=32:only=re:.*mlp.*" and (first["changed"], second["changed"]) == (6, 9)
    outside = [r["fqn"] for r in first["refusals"] if r["reason"] == "outside of only=re:.*mlp.*"]
    assert len(outside) == 9 and not any(".mlp." in fqn for fqn in outside)
    assert [r["fqn"] for r in second["refusals"] if r["reason"] == "already int4"] == [f for f in made if ".mlp." in f]
    linears = sum(p.numel() * 4 for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert first["covered_bytes"] + second["covered_bytes"] == linears, "no weight is covered twice, and none is left"

    small.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    assert str(loaded.program) == str(small.program)
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    expected = model(ids).logits
    assert 0 < (small(ids).logits - expected).norm() / expected.norm() < 0.3


def test_the_layers_are_those_that_each_format_alone_would_make():
    program = mlp()
    both, _ = run_passes(program, Context(), Options("int4:group=32:only=up;down,int8"))
    for spec, layers in (("int4:group=32", ("up", "down")), ("int8", ("head",))):
        alone, _ = run_passes(program, Context(), Options(spec))
        for fqn in (f"{layer}.{part}" for layer in layers for part in ("qweight", "scale")):
            assert torch.equal(both.constants[fqn], alone.constants[fqn])


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        # Whatever the order in which they are written, the rest comes last.
        ("int8,int4:group=32:only=up", {"up": "int4_weight_only", "down": "int8", "head": "int8"}),
        ("fp8:only=head,int8:only=up", {"up": "int8", "down": "linear", "head": "fp8"}),
        # Two that overlap: the first takes them.
        ("int8:only=up;head,fp8:only=head;down", {"up": "int8", "down": "fp8", "head": "int8"}),
        ("fp8:only=head;down,int8:only=up;head", {"up": "int8", "down": "fp8", "head": "fp8"}),
        # One format in two ways.
        ("int8,int8:mode=weight_only:only=up", {"up": "int8_weight_only", "down": "int8", "head": "int8"}),
        ("sparse24:only=up,int4:group=32:only=down,int8", {"up": "int8_sparse24", "down": "int4_weight_only", "head": "int8"}),
        ("sparse24:only=up,int4:group=32", {"up": "int4_sparse24", "down": "int4_weight_only", "head": "int4_weight_only"}),
    ],
)
def test_who_takes_which_layer(spec, made):
    program, steps = run_passes(mlp(), Context(), Options(spec))
    assert formats(program) == made
    assert [s.gates["facts"] for s in steps] == ["ok"] * len(steps)
    assert str(parse_program(str(program))) == str(program)


def test_pruning_goes_before_all_of_them():
    names = [str(p) for p in order(parse_passes("int8,prune:ffn=0.5,int4:only=up")).passes]
    assert names == ["canonicalize", "prune:ffn=0.5", "dead_structure", "int4:only=up", "int8"]
    passes = parse_passes("int8,prune:ffn=0.5,int4:group=32:only=up")
    program, _ = run_passes(mlp(), Context(), Options(passes, budget=9, layer_budget=9))
    assert formats(program) == {"up": "int4_weight_only", "down": "int8", "head": "int8"}
    assert program.constants["up.qweight"].shape == (48, 32)


def test_the_reason_for_the_order_is_said():
    ordered = order(parse_passes("int8,int4:only=a;b"))
    assert ordered.reasons[-1][-1] == "int4 is for a, b alone, and int8 takes the rest"


@pytest.mark.parametrize("spec", ["int4,int8", "int4:only=up,int8,fp8", "int8,int8:mode=weight_only", "sparse24,fp8"])
def test_two_that_are_for_all_layers_are_still_refused(spec):
    with pytest.raises(UsageError, match=r"each have to run before the other|given twice"):
        order(parse_passes(spec))


def test_a_format_that_finds_all_taken_says_so():
    with pytest.raises(UsageError, match="changed nothing") as caught:
        run_passes(mlp(), Context(), Options("int8:only=up,fp8:only=up"))
    assert "up: already int8" in caught.value.why


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UsageError, match="'re:mpl' matches no layer") as caught:
        run_passes(mlp(), Context(), Options("int8,int4:only=up;re:mpl"))
    assert caught.value.where == "int4:only"
    with pytest.raises(UsageError) as caught:
        run_passes(mlp(), Context(), Options("int8:only=heed"))
    assert "head" in caught.value.hint


def test_skip_goes_with_only():
    program, steps = run_passes(mlp(), Context(skip=("down",)), Options("int8:only=up;down"))
    assert formats(program) == {"up": "int8", "down": "linear", "head": "linear"}
    reasons = {r.fqn: r.reason for r in steps[-1].refusals}
    assert reasons == {"down": "skipped by the pattern down", "head": "outside of only=up;down"}


def test_what_is_left_of_a_packed_program_can_be_packed():
    program, _ = run_passes(mlp(), Context(), Options("int4:group=32:only=up"))
    with pytest.raises(UsageError, match=r"up.qweight is a quantized weight"):
        run_passes(program, Context(), Options("int8"))
    with pytest.raises(UsageError, match=r"up.qweight is a quantized weight"):
        run_passes(program, Context(), Options("int8:only=up"))
    rest, _ = run_passes(program, Context(), Options("int8:only=down;head"))
    assert formats(rest) == {"up": "int4_weight_only", "down": "int8", "head": "int8"}
    assert FLOAT_WEIGHTS.broken(program).keys() == {"up"}


def test_a_layer_that_another_pass_packed_is_not_left_alone():
    program, steps = run_passes(mlp(), Context(skip=("head",)), Options("int4:group=32:only=up,int8"))
    record = SimpleNamespace(coverage=1.0, passes=steps)
    assert "1 layer left alone" in coverage_text(record, FLOAT_WEIGHTS.broken(program))


@dataclass(frozen=True)
class Greedy(Int8):
    """Says that it is for some layers and takes all."""

    name: ClassVar[str] = ""

    def run(self, program, context):
        return Int8.run(replace(self, only=""), program, context)


@dataclass(frozen=True)
class Unsaid(Int8):
    """Breaks what it says that it keeps."""

    name: ClassVar[str] = ""
    breaks: ClassVar = frozenset()


def test_the_gate_of_facts_sees_what_was_packed_without_leave():
    with pytest.raises(VerificationFailed, match=r"'facts': it is for up alone, and (down|head).qweight is a quantized weight"):
        run_passes(mlp(), Context(), Options([Greedy(only="up")]))
    with pytest.raises(VerificationFailed, match=r"it says that it keeps float_weights, and up.qweight is a quantized weight"):
        run_passes(mlp(), Context(), Options([Unsaid()]))
