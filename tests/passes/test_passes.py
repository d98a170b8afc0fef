"""Passes: how they are written, ordered and refused; canonical forms; gates that hold and gates that fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import Mlp
from torch import nn

import fxc
from fxc.errors import UsageError, VerificationFailed
from fxc.ir import print_program
from fxc.ir.edit import call
from fxc.passes.base import Context, Fact, Pass, Result, parse_passes
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS
from fxc.passes.order import order
from fxc.pipeline import run_passes

aten = torch.ops.aten


def body(program) -> str:
    """The lines of the values and of the result."""
    return "\n".join(line for line in print_program(program).splitlines() if line.startswith(("%", "return")))


def canonical(model: nn.Module, *example):
    program = fxc.capture(model, example)
    return run_passes(program, parse_passes("canonicalize"), Context())[0]


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("spec", ["int8", "int8:mode=weight_only", "canonicalize"])
def test_a_pass_prints_as_it_is_written(spec):
    assert str(parse_passes(spec)[0]) == spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8:mod=dynamic", "its options: mode"),
        ("int8:mode=fast", "one of dynamic, weight_only"),
        ("int8:mode", "has no option"),
        ("int8,int8:mode=weight_only", "given twice"),
    ],
)
def test_what_is_written_wrong_says_what_there_is(spec, says):
    with pytest.raises(UsageError) as caught:
        order(parse_passes(spec))
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ ordering

DEAD = Fact("dead", lambda program: None)


def make(name_: str, **facts):
    """A pass that does nothing and is not registered."""
    made = type(name_, (Pass,), {k: frozenset(v) for k, v in facts.items()} | {"run": lambda s, p, c: Result()})
    made.name = name_.lower()
    return dataclass(frozen=True)(made)()


def named(passes):
    return [type(p).__name__ for p in passes]


def test_givers_before_needers_before_breakers():
    prune = make("Prune", needs={FLOAT_WEIGHTS})
    quantize = make("Quantize", needs={FLOAT_WEIGHTS, DEAD}, breaks={FLOAT_WEIGHTS})
    remove = make("Remove", gives={DEAD})
    assert named(order([quantize, prune, remove]).passes)[-1] == "Quantize"


def test_what_is_missing_is_added_and_said():
    ordered = order(parse_passes("int8"))
    assert [p.name for p in ordered.passes] == ["canonicalize", "int8"]
    assert ordered.reasons == [["added: int8 needs canonical"], ["canonicalize gives canonical, which int8 needs"]]


def test_a_cycle_names_both():
    one = make("One", needs={FLOAT_WEIGHTS}, breaks={FLOAT_WEIGHTS})
    two = make("Two", needs={FLOAT_WEIGHTS}, breaks={FLOAT_WEIGHTS})
    with pytest.raises(UsageError, match="one and two each have to run before the other") as caught:
        order([one, two])
    assert "float_weights" in str(caught.value)


def test_a_fact_that_nobody_gives():
    with pytest.raises(UsageError, match="needs dead, which no pass gives"):
        order([make("Lonely", needs={DEAD})], fxc.capture(Mlp(), (torch.randn(2, 40),)) and None)


def test_quantizing_twice_is_refused():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    small, _ = run_passes(program, parse_passes("int8"), Context())
    with pytest.raises(UsageError, match="is a quantized weight"):
        run_passes(small, parse_passes("int8"), Context())


# ----------------------------------------------------------------------------------------------------------- canonical


class Noise(nn.Module):
    """Much that does nothing around a product written in the way of GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(x).float().contiguous().clone()[:, :, :] * 1
        return torch.addmm(self.bias, y.view(-1, 8), self.weight).view(*y.shape[:-1], 4) + 0


def test_noise_goes_and_products_become_linears():
    program = canonical(Noise(), torch.randn(2, 3, 8))
    lines = body(program).splitlines()
    assert lines[-2].startswith("%") and "aten.linear(%0, @weight, @bias)" in lines[-2]
    assert len(lines) == 3, body(program)
    assert list(program.constants["weight"].shape) == [4, 8]


def test_a_second_run_changes_nothing():
    program = canonical(Noise(), torch.randn(2, 3, 8))
    _, steps = run_passes(program, parse_passes("canonicalize"), Context())
    assert steps[0].changed == 0


def test_what_is_random_or_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight + x @ self.weight.t() + torch.rand(3, 8) + torch.rand(3, 8)

    program = fxc.capture(Twice(), (torch.randn(3, 8),), check=False)
    small, _ = run_passes(program, parse_passes("canonicalize"), Context(), verify=False)
    assert body(small).count("aten.rand(") == 2
    assert program.nbytes() == small.nbytes()


def test_a_dropout_that_drops_is_kept():
    class Drops(nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5, training=True)

    program = fxc.capture(Drops(), (torch.randn(3, 8),), check=False)
    assert "dropout" in body(run_passes(program, parse_passes("canonicalize"), Context(), verify=False)[0])


class Square(nn.Module):
    """Products with one square weight, written in many ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.w = nn.Parameter(torch.randn(32, 32))
        self.row = nn.Parameter(torch.randn(1, 32))

    def forward(self, x):
        return self.how(x, self.w, self.row)


@pytest.mark.parametrize(
    ("how", "linears", "left"),
    [
        (lambda x, w, b: torch.relu(x @ w) @ w, 2, ()),
        (lambda x, w, b: torch.relu(x @ w.t()) @ w.t(), 2, ()),
        (lambda x, w, b: torch.relu(x @ w.transpose(-1, -2)) @ w.permute(1, 0), 2, ()),
        (lambda x, w, b: torch.addmm(b, x, w), 1, ("aten.add.Tensor",)),
        (lambda x, w, b: torch.addmm(b[0], x, w, alpha=0.5), 1, ("aten.mul.Tensor", "aten.add.Tensor")),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0), 1, ()),
        (lambda x, w, b: torch.addmm(x, x, w, beta=2), 1, ("alpha=2",)),
        (lambda x, w, b: x @ w + w.sum(), 0, ("aten.matmul", "aten.sum")),
        (lambda x, w, b: x @ w.t() + w.sum(), 1, ("aten.sum",)),
        (lambda x, w, b: x @ (w @ w), 0, ("aten.matmul",)),
        (lambda x, w, b: x @ (w @ w.t()), 1, ("aten.matmul",)),
    ],
)
def test_products_become_linears_or_are_left_and_the_fact_holds(how, linears, left):
    torch.manual_seed(0)
    model, x = Square(how), torch.randn(3, 32)
    program = canonical(model, x)
    text = body(program)
    assert text.count("aten.linear(") == linears, text
    assert all(part in text for part in left), text
    assert "aten.t(" not in text or not linears
    assert CANONICAL.check(program) is None
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x)[0], model(x), rtol=1e-4, atol=1e-4)


def test_a_product_with_the_embedding_itself_is_left_alone():
    class TiedProduct(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.e, self.turned = nn.Embedding(32, 32), turned

        def forward(self, ids):
            return self.e(ids) @ (self.e.weight.t() if self.turned else self.e.weight)

    ids = torch.randint(0, 32, (2, 5))
    assert "aten.matmul" in body(canonical(TiedProduct(False), ids))
    turned = fxc.capture(TiedProduct(True), (ids,))
    small, steps = run_passes(turned, parse_passes("int8"), Context(), allow_noop=True)
    assert "aten.linear(" in body(small) and "tied" in steps[-1].refusals[0].reason


# ---------------------------------------------------------------------------------------------------------------- int8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.body(self.embed(ids))))


def test_tied_weights_are_one_constant_and_left_alone():
    program = fxc.capture(Tied(), (torch.randint(0, 50, (2, 7)),))
    assert program.aliases == {"head.weight": "embed.weight"}
    small, steps = run_passes(program, parse_passes("int8"), Context())
    assert [(r.fqn, "tied" in r.reason) for r in steps[-1].refusals] == [("embed", True)]
    assert body(small).count("@body.qweight") == 2, "a layer that is called twice is packed once"
    assert small.aliases == program.aliases


@pytest.mark.parametrize(("pattern", "left"), [("up", {"up"}), ("re:^(up|down)$", {"up", "down"})])
def test_skip_leaves_layers_alone_and_says_so(pattern, left):
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    program.constants["head.weight"] = torch.randn(10, 40)
    small, steps = run_passes(program, parse_passes("int8"), Context(skip=(pattern,)), allow_noop=True)
    assert {r.fqn for r in steps[-1].refusals if "pattern" in r.reason} == left
    assert all(f"{fqn}.weight" in small.constants for fqn in left)


def test_a_pass_that_does_nothing_is_an_error_with_the_reasons():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    with pytest.raises(UsageError, match="changed nothing") as caught:
        run_passes(program, parse_passes("int8"), Context(skip=("*",)))
    assert "skipped by the pattern" in str(caught.value)
    assert run_passes(program, parse_passes("int8"), Context(skip=("*",)), allow_noop=True)[1][-1].changed == 0


@pytest.mark.parametrize(
    ("model", "shape", "passes", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (2, 3, 8, 8), "int8",
         ["prune:channels=0.25 (there are 8 channels that can go)", "--dtype bfloat16"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).bfloat16(), (2, 3, 8, 8), "prune:channels=0.5,int8",
         ["try: leave it out; --allow-noop"]),
        (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (2, 8), "int8", ["prune:ffn=0.25 (there are 12 FFN"]),
        (nn.Linear(8, 4), (2, 8), "int8", ["try: what would find something: --dtype bfloat16"]),
    ],
    ids=["cnn", "pruned_cnn", "classifier", "one_layer"],
)  # fmt: skip
def test_where_a_pass_finds_nothing_others_that_would_are_named(model, shape, passes, said):
    example = torch.randn(shape, dtype=next(model.parameters()).dtype)
    with pytest.raises(UsageError, match="changed nothing") as caught:
        fxc.optimize(model, (example,), passes, budget=9.0, layer_budget=9.0)
    for each in said:
        assert each in str(caught.value)
    if "prune" in str(caught.value.hint):
        spec = caught.value.hint.split(": ", 1)[1].split(" ")[0]
        assert fxc.optimize(model, (example,), spec, budget=9.0, layer_budget=9.0).report["passes"][1]["changed"] > 0


class Scaled(nn.Module):
    """A linear layer that has names of its own where int8 wants to put its constants."""

    def __init__(self, names):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        for name in names:
            inner = nn.Module() if "." in name else self
            if "." in name:
                self.add_module(name.partition(".")[0], inner)
            inner.register_parameter(name.rpartition(".")[2], nn.Parameter(-torch.rand(32)))

    def forward(self, x):
        factors = [p for n, p in self.named_parameters() if n != "weight"]
        return torch.nn.functional.linear(x, self.weight) * sum(factors)


@pytest.mark.parametrize(
    ("names", "made"),
    [
        ([], {"a.qweight", "a.scale"}),
        (["scale"], {"a.qweight", "a.int8.scale"}),
        (["qweight"], {"a.int8.qweight", "a.scale"}),
        (["scale.gain", "qweight"], {"a.int8.qweight", "a.int8.scale"}),
        (["scale", "int8"], {"a.qweight", "a.int8_2.scale"}),
    ],
)
def test_packed_weights_take_free_names(names, made):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Scaled(names)

        def forward(self, x):
            return self.a(x) + 1

    program = fxc.capture(Around(), (torch.randn(3, 32),))
    own = {f"a.{name}" for name in names}
    small, _ = run_passes(program, parse_passes("int8"), Context())
    assert set(small.constants) == made | own
    assert all(torch.equal(small.constants[n], program.constants[n]) for n in own)
    small.module()(torch.randn(3, 32))


def test_a_parameter_that_is_called_qweight_is_not_a_packed_weight():
    program = fxc.capture(Scaled(["qweight"]), (torch.randn(3, 32),))
    assert FLOAT_WEIGHTS.check(program) is None
    assert "is a quantized weight" in FLOAT_WEIGHTS.check(run_passes(program, parse_passes("int8"), Context())[0])


def test_a_weight_multiplied_by_itself_is_refused():
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return x + torch.nn.functional.linear(self.w, self.w)

    program = fxc.capture(Gram(), (torch.randn(32, 32),), check=False)
    _, steps = run_passes(program, parse_passes("int8"), Context(), allow_noop=True)
    assert steps[-1].changed == 0 and "tied" in steps[-1].refusals[0].reason


# --------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Spoil(Pass):
    """A pass that does something wrong, of a chosen kind."""

    how: str = "meaning"
    is_policy: ClassVar[bool] = False
    gives: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, program, context):
        node = program.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]
        if self.how == "meaning":
            call(program, aten.relu.default, node.args, replacing=node, by="spoil")
            program.graph.erase_node(node)
        elif self.how == "finite":
            program.constants["up.weight"] = program.constants["up.weight"] * float("nan")
        elif self.how == "orphan":
            program.constants["orphan"] = torch.zeros(2)
        elif self.how == "shape":
            program.constants["up.weight"] = torch.zeros(95, 40)
        elif self.how == "crash":
            raise ZeroDivisionError("oops")
        return Result(1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("meaning", "may not change what the program computes"),
        ("finite", "NaN or infinite"),
        ("orphan", "nothing reads it"),
        ("shape", "the graph says"),
        ("crash", "broke off"),
    ],
)
def test_every_gate_can_fail(how, says):
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    text = print_program(program)
    spoil = Spoil(how)
    object.__setattr__(spoil, "name", "spoil")
    with pytest.raises(VerificationFailed) as caught:
        run_passes(program, [spoil], Context())
    assert says in str(caught.value)
    assert print_program(program) == text, "a failed pass must leave its input as it was"


def test_a_broken_promise_is_found():
    class Liar(Spoil):
        gives = frozenset({CANONICAL})

        def run(self, program, context):
            return Result(0)

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.weight

    program = fxc.capture(Product(), (torch.randn(2, 8),))
    with pytest.raises(VerificationFailed, match="promises canonical"):
        run_passes(program, [Liar()], Context())


def test_a_budget_can_be_exceeded_and_names_the_layer():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    with pytest.raises(VerificationFailed, match="the budget is 1e-06") as caught:
        run_passes(program, parse_passes("int8"), Context(), budget=1e-6)
    assert any(f" {layer}:" in str(caught.value) for layer in ("up", "down", "head"))


def test_edits_keep_types():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    node = program.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]
    with pytest.raises(TypeError, match="cannot replace"):
        call(program, aten.sum.dim_IntList, (node.args[0], [1]), replacing=node, by="test")
