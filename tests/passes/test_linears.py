"""What the passes of all formats have in common: what they compress, leave alone, refuse and name."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import build
from formats import DTYPES, SPECS, captured, compiled, learned, normal, refusals, targets
from torch import nn

import fxc
from fxc.analysis.sizes import bytes_by_kind
from fxc.errors import InputRefused, UsageError, VerificationFailed
from fxc.ir import parse_program, print_program
from fxc.ir.edit import sweep
from fxc.options import Options
from fxc.passes.base import Context, Pass, parse_passes
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.float64 import in_float64
from fxc.passes.int4 import Int4
from fxc.passes.order import order
from fxc.pipeline import run_passes


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pass_stays_close_gets_smaller_and_round_trips(spec, dtype):
    program, steps = compiled(spec, dtype)
    assert all(step.changed for step in steps[1:]) and steps[-1].bytes_after < steps[-1].bytes_before
    assert steps[-1].gates["meaning"].startswith("ok") and steps[-1].gates["layers"].startswith("ok")
    text = print_program(program)
    assert print_program(parse_program(text, program.constants)) == text
    limits = {"sparse24": 0.5, "bits=2": 0.6, "bits=3": 0.3, "int4": 0.2, "fp8": 0.06}
    assert 0 < max(steps[-1].layer_errors.values()) < next(limit for part, limit in limits.items() if part in spec)


@pytest.mark.fault(6, 13)
def test_layers_that_do_not_fit_are_left_and_it_says_what_to_do():
    program, steps = compiled("int4:group=64")
    said = refusals(steps)
    assert said.keys() == {"up", "down", "odd", "head"}
    assert said["up"] == "group=64 does not divide its rows of 32: use int4:group=32"
    assert said["odd"].endswith("rows of 36: no size of groups does: leave it, or use int8")
    assert "only 8 outputs" in compiled("int4:group=32")[1][-1].refusals[-1].reason
    assert targets(program) == {"fxc.int4_weight_only_linear": 3}
    said = refusals(compiled("sparse24")[1])
    assert said.keys() == {"odd", "head"} and "36 are not a multiple of 8" in said["odd"] and "round_to=8" in said["odd"]

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(42, 32)

        def forward(self, x):
            return self.only(x) + 1

    program = fxc.capture(Narrow(), (torch.randn(3, 42),))
    with pytest.raises(UsageError, match="changed nothing") as caught:
        run_passes(program, Context(), Options("sparse24"))
    assert "only: its rows of 42 are not a multiple of 4" in str(caught.value)
    with pytest.raises(UsageError, match="only: group=128 does not divide its rows of 42") as caught:
        run_passes(program, Context(), Options("int4"))


@pytest.mark.fault(6)
def test_each_layer_has_the_largest_group_that_divides_its_rows_and_the_report_says_which():
    program, steps = compiled("int4:group=auto")
    sizes = {n: list(program.constants[f"{n}.scale"].shape) for n in ("q", "k", "v", "up", "down")}
    assert sizes == {"q": [32, 1], "k": [32, 1], "v": [32, 1], "up": [96, 1], "down": [36, 3]}
    assert steps[-1].notes == ["groups of 64 in 3 layers; of 32 in up, down"]
    assert refusals(steps)["odd"] == "no size of groups divides its rows of 36: leave it, or use int8"
    learned_one = learned("int4:group=auto:algorithm=grid")[0]
    assert {n: list(learned_one.constants[f"{n}.scale"].shape) for n in sizes} == sizes
    assert str(parse_passes("int4:group=auto")[0]) == "int4:group=auto"


def test_a_group_that_is_none_is_refused_at_once():
    with pytest.raises(UsageError, match="'some' is not a int, nor auto"):
        parse_passes("int4:group=some")
    with pytest.raises(UsageError, match="one of 32, 64, 128"):
        parse_passes("int4:group=100")
    assert str(parse_passes("int4:group=64:symmetric=false")[0]) == "int4:group=64:symmetric=false"
    assert parse_passes("int4") == [Int4(128, True)]


@cache
def family(name: str):
    return fxc.capture(build(name)[0], check=False)


@pytest.mark.fault(4)
@pytest.mark.parametrize(("spec", "kind"), [("int4:group=32", "int4"), ("fp8", "fp8"), ("sparse24", "2:4")])
def test_experts_and_tied_embeddings_have_no_such_form(spec, kind):
    _, steps = run_passes(family("mixtral"), Context(), Options(spec, verify=False))
    reasons = [r.reason for r in steps[-1].refusals]
    assert sum(f"there is no {kind} form of the experts of a mixture" in reason for reason in reasons) == 4
    _, steps = run_passes(family("gemma"), Context(), Options(spec, verify=False))
    assert [(r.fqn, "tied" in r.reason) for r in steps[-1].refusals] == [("model.embed_tokens", True)]


@pytest.mark.parametrize("first", ["int8", "int4:group=32", "fp8", "sparse24", "sparse24,int8", "sparse24,int4:group=32"])
@pytest.mark.parametrize("second", ["int4:group=32", "fp8", "sparse24", "prune:ffn=0.5"])
def test_what_is_packed_already_is_refused(first, second):
    small, _ = compiled(first)
    if (first, second) == ("sparse24", "int4:group=32"):
        return  # What 2:4 leaves is rounded.
    with pytest.raises(UsageError, match=r"is a (quantized|2:4 sparse) weight") as caught:
        run_passes(small, Context(), Options(second))
    assert "start from the original model" in str(caught.value)


@pytest.mark.parametrize("spec", ["int4,int8", "int4,fp8", "fp8,int8", "fp8,sparse24"])
def test_two_formats_of_one_weight_are_refused(spec):
    with pytest.raises(UsageError, match="each have to run before the other"):
        order(parse_passes(spec))


def test_facts_and_float64_know_the_formats():
    program = captured()
    assert FLOAT_WEIGHTS.check(program) is None and DENSE_WEIGHTS.check(program) is None
    for spec in SPECS:
        after, _ = compiled(spec)
        assert CANONICAL.check(after) is None
        assert ("quantized" in (FLOAT_WEIGHTS.check(after) or "")) == (spec != "sparse24")
        assert ("2:4" in (DENSE_WEIGHTS.check(after) or "")) == ("sparse24" in spec)
        wide = in_float64(after)
        assert (wide is None) == (spec != "sparse24"), "its numbers are the model's own: it computes in float64"
        if wide is not None:
            assert wide.module()(normal(3, 5, 64).double())[0].dtype == torch.float64


def test_a_weight_that_stays_beside_its_packed_form_is_found():
    class Forgetful(Int4):
        name = "forgetful"

        def run(self, program, context):
            kept = program.constants["q.weight"]
            result = super().run(program, context)
            last = program.graph.output_node().args[0][0]
            with program.graph.inserting_before(last):
                node = program.graph.get_attr("q.weight")
            program.constants["q.weight"] = kept
            node.meta["val"] = last.args[0].meta["val"].new_empty(kept.shape)
            with program.graph.inserting_before(last):
                total = program.graph.call_function(torch.ops.aten.sum.default, (node,))
                total.meta["val"] = node.meta["val"].new_empty(())
                added = program.graph.call_function(torch.ops.aten.add.Tensor, (last.args[0], total))
                added.meta["val"] = last.args[0].meta["val"]
            last.replace_input_with(last.args[0], added)
            sweep(program)
            return result

    try:
        with pytest.raises(VerificationFailed, match="float weight is still there"):
            run_passes(captured(), Context(), Options([Forgetful(32)]))
    finally:
        del Pass.registry["forgetful"]


@pytest.mark.fault(8)
def test_what_is_not_finite_names_its_layer():
    program = captured().copy()
    program.constants["up.weight"] = program.constants["up.weight"] * float("nan")
    for spec in ("int4:group=32", "fp8", "sparse24", "int8"):
        with pytest.raises(InputRefused, match=r"up\.weight: the weight holds NaN or Inf"):
            run_passes(program, Context(), Options(spec))


@pytest.mark.parametrize("spec", SPECS)
def test_without_values_the_shapes_are_planned(spec):
    program = captured().copy()
    real, _ = run_passes(program, Context(), Options(spec))
    program.constants = {name: t.to("meta") for name, t in program.constants.items()}
    planned, _ = run_passes(program, Context(), Options(spec))
    assert planned.is_on_meta and print_program(planned) == print_program(real)


def test_weights_that_are_called_like_parts_take_free_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(normal(32, 64))
            self.scale = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.values) * self.scale

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Named()

        def forward(self, x):
            return self.a(x) + 1

    program = fxc.capture(Around(), (normal(3, 64),))
    small, _ = run_passes(program, Context(), Options("sparse24"))
    assert set(small.constants) == {"a.values.values", "a.values.meta", "a.scale"}
    both, _ = run_passes(program, Context(), Options("sparse24,int8"))
    assert set(both.constants) == {"a.values.qweight", "a.values.scale", "a.values.meta", "a.scale"}
    torch.testing.assert_close(both.module()(normal(3, 64))[0], small.module()(normal(3, 64))[0], rtol=0.1, atol=0.2)


@pytest.mark.fault(3)
def test_a_weight_of_two_layers_is_packed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(32, 32)

        def forward(self, x):
            return self.body(torch.relu(self.body(x)))

    program = fxc.capture(Twice(), (normal(3, 32),))
    for spec, part in (("int4:group=32", "qweight"), ("fp8", "qweight"), ("sparse24", "values"), ("sparse24,int8", "meta")):
        small, _ = run_passes(program, Context(), Options(spec))
        assert print_program(small).count(f"@body.{part}") == 3  # its declaration and two uses


def test_reports_name_the_formats():
    assert bytes_by_kind(compiled("int4:group=32:symmetric=false")[0])["zero points"] == 3 * 32 * 2 + 96 + 36 * 3
    assert bytes_by_kind(compiled("fp8")[0])["fp8 linear"] == 3 * 32 * 64 + 96 * 32 + 36 * 96 + 36 * 32
    kinds = bytes_by_kind(compiled("sparse24")[0])
    assert kinds["2:4 linear"] == 16 * kinds["2:4 places"] == 2 * (3 * 32 * 64 + 96 * 32 + 36 * 96)
    assert "int8 2:4 linear" in bytes_by_kind(compiled("sparse24,int8")[0])
    assert "int4 linear" in bytes_by_kind(compiled("int4:group=32")[0])
