"""How many units go, over a layer or the model, and which; pruning from end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import build
from pruned import DATA, Mlp, Repeated, Residual, counts, gelu, masked, stack, three_layers, zero_columns
from removal import EXACT, canonical, difference, shapes, sliced
from torch import nn

import fxc.passes
from fxc.data.decoder import decoder_sample
from fxc.data.samples import samples
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context, Fact, Pass, Result
from fxc.passes.prune.prune import Prune
from fxc.pipeline import run_passes


@pytest.mark.parametrize(
    ("spec", "gone"),
    [
        ("ffn=0.1", 4),
        ("ffn=0.25", 10),
        ("ffn=0.333", 13),
        ("ffn=0.99", 39),
        ("ffn=0.25:round_to=8", 8),  # 30 would stay, 32 do
        ("ffn=0.4:round_to=16", 8),  # 24 are between 16 and 32
        ("ffn=0.99:round_to=16", 24),
        ("ffn=0.5:round_to=64", None),  # there are no 64
        ("ffn=0.001", None),
    ],
)
def test_counts_are_those_asked_for(spec, gone):
    _, result = masked(three_layers(), f"prune:{spec}")
    assert counts(result) == ({f"layers.{i}": (40, gone) for i in range(3)} if gone else {})
    assert result.changed == 3 * (gone or 0)


@pytest.mark.parametrize("criterion", ["l2", "wanda", "taylor", "mask_gradient"])
def test_over_the_model_the_total_is_what_was_asked_for(criterion):
    program = three_layers()
    _, result = masked(program, f"prune:ffn=0.3:scope=global:criterion={criterion}", samples(program))
    found = counts(result)
    assert sum(n for _, n in found.values()) == 36 and all(n < 40 for _, n in found.values())


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6])
def test_over_the_model_channels_are_kept_in_multiples_too(share):
    after, result = masked(three_layers(), f"prune:ffn={share}:scope=global:round_to=8")
    left = [size - gone for size, gone in counts(result).values()]
    assert all(n % 8 == 0 and n for n in left), left
    for name, (_, gone) in counts(result).items():
        assert len(zero_columns(after.constants[f"{name}.down.weight"])) == gone


@pytest.mark.fault(17)
def test_over_the_model_one_unit_of_each_layer_stays():
    after, result = masked(three_layers(), "prune:ffn=0.99:scope=global")
    assert all(before - gone >= 1 for before, gone in counts(result).values())
    assert sum(gone for _, gone in counts(result).values()) == 117
    small, _ = sliced(after)
    assert [shapes(small)[f"layers.{i}.up.bias"] for i in range(3)] == [[1]] * 3


def test_over_the_model_taylor_compares_layers():
    """Of a layer that hardly adds anything all but one unit go before one of another does."""
    torch.manual_seed(4)
    program = stack(Residual(10), Residual(10, 1e-4), Residual(10))
    _, result = masked(program, "prune:ffn=0.3:scope=global:criterion=taylor", samples(program))
    assert counts(result) == {"layers.1": (10, 9)}


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("heads", "kv", "share", "left"),
    [
        (8, 2, 0.25, 6),  # one query head of each KV head
        (8, 4, 0.25, 6),  # a KV head with both of its query heads
        pytest.param(8, 4, 0.5, 4, marks=pytest.mark.slow),
        (6, 2, 0.5, 3),  # one KV head
        pytest.param(7, 1, 0.3, 5, marks=pytest.mark.slow),
        pytest.param(4, 4, 0.3, 3, marks=pytest.mark.slow),
        (8, 2, 0.99, 1),  # one query head of one KV head
        (8, 4, 0.6, 3),  # one query head of three KV heads
    ],
)
def test_uniform_heads_leave_every_kv_head_as_many_queries(heads, kv, share, left):
    torch.manual_seed(1)
    program = stack(*(Repeated(heads, kv) for _ in range(2)))
    after, result = masked(program, f"prune:heads={share}:uniform=true")
    assert {r.before - r.removed for r in result.removed} == {left} and len(result.removed) == 2
    small, cut = sliced(after)
    assert difference(after, small, cut) <= EXACT
    assert not [fqn for fqn in small.constants if fqn.endswith("kv_index")], "no index: it can be said in a configuration"
    widths = {(shapes(small)[f"layers.{i}.q.weight"][0], shapes(small)[f"layers.{i}.k.weight"][0]) for i in (0, 1)}
    assert len(widths) == 1 and widths.pop()[0] == 4 * left


def test_uniform_leaves_alone_what_is_uneven_already():
    program, _ = sliced(masked(stack(Repeated(6, 2), Repeated(6, 2)), "prune:drop=layers.0/heads/1")[0])
    after, result = masked(program, "prune:heads=0.5:uniform=true")
    assert counts(result) == {"layers.1": (6, 3)}
    assert [(r.fqn, "different numbers of query heads" in r.reason) for r in result.refusals] == [("layers.0", True)]
    # Without it, and by number, it can be pruned again.
    again, _ = masked(after, "prune:drop=layers.0/kv_heads/0")
    small, cut = sliced(again)
    assert difference(again, small, cut) <= EXACT and shapes(small)["layers.0.q.weight"] == [12, 10]


def test_uniform_leaves_alone_what_is_no_numbered_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Residual(), Residual()])
            self.head = nn.Sequential()
            self.pool, self.out = nn.Linear(10, 12), nn.Linear(12, 3)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.out(gelu(self.pool(x)))

    program = canonical(Model(), (torch.randn(2, 10),))
    _, result = masked(program, "prune:ffn=0.5:uniform=true")
    assert set(counts(result)) == {"layers.0", "layers.1"}
    assert any("numbered layers only" in r.reason for r in result.refusals)
    assert len(counts(masked(program, "prune:ffn=0.5")[1])) == 3


def test_what_is_skipped_stays_and_is_said_to():
    after, result = masked(three_layers(), "prune:ffn=0.5", skip=("layers.1*",))
    assert set(counts(result)) == {"layers.0", "layers.2"}
    assert [(r.fqn, r.reason) for r in result.refusals] == [("layers.1", "skipped by the pattern layers.1*")]
    assert torch.equal(after.constants["layers.1.down.weight"], three_layers().constants["layers.1.down.weight"])


def test_the_program_that_is_pruned_is_not_written_to():
    program = three_layers()
    before = {fqn: t.clone() for fqn, t in program.constants.items()}
    run_passes(program, Context(), Options("prune:ffn=0.5", verify=False))
    assert all(torch.equal(t, before[fqn]) for fqn, t in program.constants.items())


@pytest.fixture
def again(monkeypatch):
    """A policy that prunes what removal left, and what it is given."""
    given: list[Context] = []
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))

    @dataclass(frozen=True)
    class Again(Prune):
        name: ClassVar[str] = "again"
        owes: ClassVar[frozenset[Fact]] = frozenset()

        def run(self, program: Program, context: Context) -> Result:
            given.append(context)
            return super().run(program, context)

    return given


@pytest.mark.parametrize(
    "second",
    [*(f"again:ffn=0.25:criterion={c}" for c in ("wanda", "taylor", "mask_gradient")), "again:budget=1", "again:layers=0.5"],
)
def test_a_policy_after_removal_learns_from_its_data(again, second):
    """Samples with a filled cache, which loses a layer and heads before the second policy reads them."""
    program = canonical(*build("qwen2"))
    data = [decoder_sample(program, batch, new=6, past=past) for batch, past in ((1, 3), (2, 0), (2, 5), (1, 2))]
    first = "prune:heads=0.5:uniform=true" + ("" if "layers" in second else ":layers=0.5")
    options = {"budget": 9.0, "layer_budget": 9.0}
    _, steps = run_passes(program, Context(samples=data), Options(f"{first},dead_structure,{second}", **options))
    assert [step.name.partition(":")[0] for step in steps] == ["canonicalize", "prune", "dead_structure", "again"]
    assert steps[-1].changed > 0
    (context,) = again
    caches = 4 if "layers" in second else 2
    for before, after in zip(data, context.samples, strict=True):
        assert len(after) == 3 + caches
        assert torch.equal(after[0], before[0])
        # One of two KV heads is left.
        assert {tensor.shape[1] for tensor in after[3:]} == {1} and before[3].shape[1] == 2
        assert all(a.shape[2] == before[3].shape[2] for a in after[3:])


def test_pruned_removed_and_quantized_in_that_order_through_all_gates(tmp_path):
    model, _ = build("qwen2")
    compiled = fxc.optimize(model, passes="int8,prune:heads=0.25:ffn=0.3:criterion=wanda", calib=[
        {"input_ids": torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(n))} for n in range(3)
    ])  # fmt: skip
    steps = compiled.report["passes"]
    assert [s["name"].partition(":")[0] for s in steps] == ["canonicalize", "prune", "dead_structure", "int8"]
    assert [s["parameters_after"] < s["parameters_before"] for s in steps[:3]] == [False, False, True]
    assert {(r["scope"], r["kind"], r["before"], r["removed"]) for r in steps[2]["removed"]} == {
        (f"model.layers.{i}.{part}", kind, size, gone)
        for i in (0, 1)
        for part, kind, size, gone in (("self_attn", "head", 4, 1), ("mlp", "ffn", 160, 48))
    }
    assert steps[1]["removed"] == steps[2]["removed"] or len(steps[1]["removed"]) == 4
    assert compiled.report["parameters_after"] < compiled.report["parameters_before"]
    ids = torch.randint(3, 300, (2, 5))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    compiled.save(tmp_path / "out")
    assert torch.equal(fxc.load(tmp_path / "out").generate(ids, **options), compiled.generate(ids, **options))


def test_a_float32_model_with_constants_to_fold_goes_through_the_gates():
    model = Mlp()
    with torch.no_grad():
        model.up.weight[[2, 3]] = 0
    compiled = fxc.optimize(model, (DATA[0],), passes="dead_structure")
    assert shapes(compiled.program)["up.weight"] == [6, 5]
    with torch.no_grad():
        torch.testing.assert_close(compiled(DATA[1]), model(DATA[1]))
