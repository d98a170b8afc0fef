"""Pruning policies: what each criterion says of a unit, how many go and which, decisions from outside, and what is refused."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import build
from removal import EXACT, Attention, canonical, difference, shapes, sliced, with_forward
from torch import Tensor, nn

import fxc.passes
from fxc.analysis.groups import groups
from fxc.data.samples import causal_lm_sample, samples
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Pass, Result, parse_passes
from fxc.passes.prune.blocks import blocks, influence
from fxc.passes.prune.plan import Drop, parse_drops, read_plan
from fxc.passes.prune.prune import Prune, with_drops
from fxc.passes.prune.scores import CRITERIA, mask_gradients, scores
from fxc.pipeline import run_passes
from fxc.runtime.model import compiled_model
from fxc.verify.compare import in_float64

gelu = torch.nn.functional.gelu


def masked(program: Program, spec: str, data: list | None = None, skip: tuple[str, ...] = ()) -> tuple[Program, Result]:
    after = program.copy()
    (step,) = parse_passes(spec)
    return after, step.run(after, Context(samples=data or [], skip=skip))


def counts(result: Result) -> dict[str, tuple[int, int]]:
    return {r.scope: (r.before, r.removed) for r in result.removed}


def zero_columns(weight: Tensor) -> list[int]:
    return (~weight.any(0)).nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------------------------------ criteria


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(gelu(self.up(x)))


DATA = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@functools.cache
def tiny() -> tuple[Mlp, Program]:
    model = Mlp()
    return model, canonical(model, (DATA[0],))


def scored(criterion: str) -> Tensor:
    _, program = tiny()
    its = [g for g in groups(program) if g.kind == "ffn"]
    (found,) = scores(program, its, criterion, [[x] for x in DATA]).values()
    return found


def loss_of(output: Tensor) -> Tensor:
    """A fixed random combination of the outputs."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output * direction).sum() / output.numel() ** 0.5


def gradients_by_weights() -> Tensor:
    """[samples, units]: the gradient times the weight, summed over the weights that read a unit."""
    model, rows = tiny()[0], []
    for x in DATA:
        model.zero_grad()
        loss_of(model(x)).backward()
        rows.append((model.down.weight.grad * model.down.weight).sum(0).detach())
    return torch.stack(rows).double()


def test_magnitudes():
    model, _ = tiny()
    up, down = model.up.weight.detach().double(), model.down.weight.detach().double()
    torch.testing.assert_close(scored("l1"), up.abs().sum(1) + down.abs().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(scored("l2"), (up.square().sum(1) + down.square().sum(0)).sqrt(), rtol=1e-6, atol=0)


def test_wanda_is_the_weight_times_the_norm_of_what_it_multiplies():
    model, _ = tiny()
    with torch.no_grad():
        activations = torch.cat([gelu(model.up(x)) for x in DATA]).double()
    expected = (model.down.weight.detach().double().abs() * activations.norm(dim=0)).sum(0)
    torch.testing.assert_close(scored("wanda"), expected, rtol=1e-5, atol=0)


def test_taylor_is_the_squared_gradient_times_weight():
    torch.testing.assert_close(scored("taylor"), gradients_by_weights().square().mean(0), rtol=1e-4, atol=1e-9)


def test_mask_gradients_are_those_of_finite_differences():
    _, program = tiny()
    (group,) = (g for g in groups(program) if g.kind == "ffn")
    (found,) = mask_gradients(program, [group], [[x] for x in DATA]).values()
    torch.testing.assert_close(found, gradients_by_weights(), rtol=1e-4, atol=1e-7)
    wide, step = Mlp().double(), 1e-6
    for sample, x in enumerate(DATA):
        for unit in range(8):
            losses = []
            for mask in (1 + step, 1 - step):
                with torch.no_grad():
                    hidden = gelu(wide.up(x.double()))
                    hidden[:, unit] *= mask
                    losses.append(loss_of(wide.down(hidden)).item())
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(found[sample, unit].item(), rel=1e-3, abs=1e-6)


def test_mask_gradient_is_the_mean_magnitude_over_the_norm_of_the_layer():
    mean = gradients_by_weights().abs().mean(0)
    torch.testing.assert_close(scored("mask_gradient"), mean / mean.norm(), rtol=1e-4, atol=1e-9)


def test_batch_norm_scales():
    model = with_forward(
        lambda self, x: self.b(torch.relu(self.norm(self.a(x)))),
        a=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), b=nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    program = canonical(model, (torch.randn(2, 3, 6, 6).double(),))
    its = [g for g in groups(program) if g.kind == "channel" and not g.pinned]
    (found,) = scores(program, its, "bn_scale").values()
    torch.testing.assert_close(found, model.norm.weight.detach().abs())
    after, _ = masked(program, "prune:channels=0.5:criterion=bn_scale")
    gone = (~after.constants["b.weight"].any(0).flatten(1).any(1)).nonzero().flatten()
    assert sorted(gone.tolist()) == sorted(model.norm.weight.abs().argsort()[:3].tolist())


def test_a_grouped_convolution_is_scored_like_each_of_its_groups():
    """Wanda where one position of the weight reads a channel of each group."""
    model = with_forward(
        lambda self, x: self.last(self.second(torch.relu(self.first(x)))),
        first=nn.Conv2d(3, 6, 1), second=nn.Conv2d(6, 4, 1, groups=2), last=nn.Conv2d(4, 2, 1),
    ).float()  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    program = canonical(model, (x,))
    its = [g for g in groups(program) if g.kind == "channel" and not g.pinned and ("second.weight", 1) in
           {(m.fqn, m.dim) for m in g.members}]  # fmt: skip
    (found,) = scores(program, its, "wanda", [[x]]).values()
    with torch.no_grad():
        norms = torch.relu(model.first(x)).double().square().sum((0, 2, 3)).sqrt().reshape(2, 3)
    expected = model.second.weight.detach().double().abs().sum((0, 2, 3)) * norms.sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_heads_of_a_language_model_are_scored_by_the_loss_of_the_next_token():
    model, _ = build("gpt2")
    program = canonical(model)
    its = [g for g in groups(program) if g.kind == "head"]
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    inputs = [causal_lm_sample(program, 1, 9, 0, ids=row[None]) for row in ids]
    found = mask_gradients(program, its, inputs)
    for sample, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for layer, group in zip(model.transformer.h, its, strict=True):
            weight = layer.attn.c_proj.weight  # stored as [inputs, outputs]
            expected = (weight.grad * weight).detach().reshape(4, -1).sum(1).double()
            torch.testing.assert_close(found[group][sample], expected, rtol=1e-3, atol=1e-7)
    taylor = scores(program, its, "taylor", inputs)
    torch.testing.assert_close(taylor[its[0]], found[its[0]].square().mean(0))


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "bn_scale"])
def test_a_unit_that_was_made_small_goes_first_by_every_criterion(criterion):
    model = Mlp()
    with torch.no_grad():
        for part in (model.up.weight, model.up.bias):
            part[[1, 6]] *= 1e-3
        model.down.weight[:, [1, 6]] *= 1e-3
    program = canonical(model, (DATA[0],))
    after, result = masked(program, f"prune:ffn=0.25:criterion={criterion}", [[x] for x in DATA])
    assert zero_columns(after.constants["down.weight"]) == [1, 6]
    assert counts(result) == {"": (8, 2)} or list(counts(result).values()) == [(8, 2)]
    assert torch.equal(after.constants["up.weight"], program.constants["up.weight"]), "only what reads a unit is masked"


# ------------------------------------------------------------------------------------------------------------ how many


class Stack(nn.Module):
    """Numbered residual layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nn.Module):
    def __init__(self, hidden: int = 40, scale: float = 1.0):
        super().__init__()
        self.up, self.down = nn.Linear(10, hidden), nn.Linear(hidden, 10)
        with torch.no_grad():
            self.down.weight *= scale
            self.down.bias *= scale

    def forward(self, x):
        return x + self.down(gelu(self.up(x)))


def stack(*layers) -> Program:
    return canonical(Stack(layers), (torch.randn(2, 5, 10),))


@functools.cache
def three_layers() -> Program:
    torch.manual_seed(4)
    return stack(Residual(40), Residual(40, 0.1), Residual(40, 3.0))


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


class Repeated(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.float()


@pytest.mark.parametrize(
    ("heads", "kv", "share", "left"),
    [
        (8, 2, 0.25, 6),  # one query head of each KV head
        (8, 4, 0.25, 6),  # a KV head with both of its query heads
        (8, 4, 0.5, 4),
        (6, 2, 0.5, 3),  # one KV head
        (7, 1, 0.3, 5),
        (4, 4, 0.3, 3),
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
    run_passes(program, parse_passes("prune:ffn=0.5"), Context(), verify=False)
    assert all(torch.equal(t, before[fqn]) for fqn, t in program.constants.items())


# -------------------------------------------------------------------------------------------------------------- layers


def test_the_layer_that_changes_least_is_dropped():
    torch.manual_seed(4)
    program = stack(Residual(), Residual(), Residual(scale=1e-3), Residual())
    found, why = blocks(program)
    assert [b.scope for b in found] == [f"layers.{i}" for i in range(4)] and not why
    after, result = masked(program, "prune:layers=0.25", samples(program))
    assert [(r.scope, r.kind) for r in result.removed] == [("layers.2", "layer")]
    small, _ = sliced(after)
    assert not [fqn for fqn in small.constants if "layers.2." in fqn] and len(small.constants) == 12


def test_influence_is_one_less_the_cosine_of_input_and_output():
    torch.manual_seed(4)
    layers = [Residual(), Residual(scale=0.1)]
    program = stack(*layers)
    inputs = samples(program)
    found = influence(program, blocks(program)[0], inputs)
    cosines: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for (x,) in inputs:
            for layer, its in zip(layers, cosines):
                y = layer(x)
                its.append(torch.nn.functional.cosine_similarity(x, y, dim=-1).flatten())
                x = y
    for value, its in zip(found.values(), cosines, strict=True):
        assert value == pytest.approx(1 - torch.cat(its).mean().item(), abs=1e-6)


def test_one_layer_always_stays():
    program = three_layers()
    _, result = masked(program, "prune:layers=0.99", samples(program))
    assert len(result.removed) == 2


def test_dropping_a_layer_of_a_decoder_is_leaving_it_out():
    model, _ = build("qwen2")
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight *= 1e-4
        layer.mlp.down_proj.weight *= 1e-4
    compiled = fxc.optimize(model, passes="prune:layers=0.5", calib=[{"input_ids": torch.randint(3, 300, (2, 8))}])
    names = [step["name"].partition(":")[0] for step in compiled.report["passes"]]
    assert names == ["canonicalize", "prune", "dead_structure"]
    assert not [fqn for fqn in compiled.program.constants if "layers.0." in fqn]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wide = compiled_model(in_float64(compiled.program), {}, config=compiled.config)
    assert torch.equal(wide.generate(ids, **options), model.double().generate(ids, **options))


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
    data = [causal_lm_sample(program, batch, new=6, past=past) for batch, past in ((1, 3), (2, 0), (2, 5), (1, 2))]
    first = "prune:heads=0.5:uniform=true" + ("" if "layers" in second else ":layers=0.5")
    options = {"budget": 9.0, "layer_budget": 9.0}
    _, steps = run_passes(program, parse_passes(f"{first},dead_structure,{second}"), Context(samples=data), **options)
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


# ----------------------------------------------------------------------------------------------------------- by decree


@pytest.mark.parametrize(
    ("text", "drops"),
    [
        ("model.layers.4", [Drop("model.layers.4")]),
        ("model.layers.3.self_attn:heads=0,5", [Drop("model.layers.3.self_attn", "heads", (0, 5))]),
        ("a/ffn/7+3+7", [Drop("a", "ffn", (3, 7))]),
        ("a:kv_heads=1; b.2 ;c:channels=0", [Drop("a", "kv_heads", (1,)), Drop("b.2"), Drop("c", "channels", (0,))]),
        ("", []),
    ],
)
def test_drops_are_read_and_written(text, drops):
    assert list(parse_drops(text)) == drops
    assert list(parse_drops(";".join(map(str, drops)))) == drops


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:heads", "does not say what to drop"),
        ("a:heads=", "does not say what to drop"),
        ("a:heads=x", "does not say what to drop"),
        ("a:heads=-1", "does not say what to drop"),
        ("a b", "does not say what to drop"),
        ("a:toes=1", "one of heads, kv_heads, ffn, channels"),
        ("a:heads=,", "a list of numbers"),
    ],
)
def test_drops_that_are_none(text, says):
    with pytest.raises(UsageError) as caught:
        parse_drops(text)
    assert says in str(caught.value)


def test_units_are_dropped_by_number():
    after, result = masked(three_layers(), "prune:drop=layers.1/ffn/0+7;layers.2/ffn/39")
    assert counts(result) == {"layers.1": (40, 2), "layers.2": (40, 1)}
    columns = [zero_columns(after.constants[f"layers.{i}.down.weight"]) for i in range(3)]
    assert columns == [[], [0, 7], [39]]


def test_heads_and_kv_heads_are_dropped_by_number():
    program = stack(Repeated(6, 2), Repeated(6, 2))
    after, _ = masked(program, "prune:drop=layers.0/heads/1+5;layers.1/kv_heads/0")
    assert zero_columns(after.constants["layers.0.o.weight"]) == [4, 5, 6, 7, 20, 21, 22, 23]
    assert zero_columns(after.constants["layers.1.o.weight"]) == list(range(12))
    small, _ = sliced(after)
    assert [shapes(small)[f"layers.{i}.k.weight"][0] for i in (0, 1)] == [8, 4]


def test_layers_are_dropped_by_name_beside_units_of_others():
    after, result = masked(three_layers(), "prune:drop=layers.0/ffn/3;layers.1")
    assert {(r.scope, r.kind) for r in result.removed} == {("layers.0", "ffn"), ("layers.1", "layer")}
    small, _ = sliced(after)
    assert shapes(small)["layers.0.up.weight"] == [39, 10] and "layers.1.up.weight" not in small.constants


def test_a_plan_is_a_file(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"drop": ["layers.1", {"module": "layers.0", "ffn": [4, 2]}, {"module": "layers.2"}]}))
    assert read_plan(plan) == (Drop("layers.1"), Drop("layers.0", "ffn", (2, 4)), Drop("layers.2"))
    plan.write_text(json.dumps({"drop": ["layers.1", {"module": "layers.0", "ffn": [4, 2]}]}))
    (step,) = with_drops([], ["layers.2:ffn=1"], str(plan))
    after = three_layers().copy()
    result = step.run(after, Context())
    assert {(r.scope, r.kind, r.removed) for r in result.removed} == {
        ("layers.0", "ffn", 2), ("layers.1", "layer", 1), ("layers.2", "ffn", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "an object with one list"),
        ('{"drop": {}}', "an object with one list"),
        ('{"drop": [], "more": 1}', "an object with one list"),
        ('{"drop": [3]}', "names no module"),
        ('{"drop": [{"ffn": [1]}]}', "names no module"),
        ('{"drop": [{"module": "a", "ffn": 1}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "ffn": [-1]}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "ffn": [true]}]}', "a list of numbers"),
        ('{"drop": [{"module": "a", "toes": [1]}]}', "one of heads"),
        ('{"drop": ["a:toes=1"]}', "one of heads"),
    ],
)
def test_plans_that_are_none(tmp_path, content, says):
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_plan(plan)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ("layers.7", "cannot be dropped as a whole"),
        ("layers.1.up", "cannot be dropped as a whole"),
        ("layers.7/ffn/0", "no groups of ffn are in it"),
        ("layers/ffn/0", "3 groups of ffn are in it"),
        ("layers.1/heads/0", "no groups of heads are in it"),
        ("layers.1/ffn/40", "it has ffn 0 to 39, not 40"),
        ("layers.1/ffn/" + "+".join(map(str, range(40))), "these are all of its 40 FFN channels"),
    ],
)
def test_what_cannot_be_dropped_says_why(drop, says):
    with pytest.raises(UsageError) as caught:
        masked(three_layers(), f"prune:drop={drop}")
    assert says in str(caught.value), str(caught.value)


def test_all_kv_heads_are_all_heads():
    program = stack(Repeated(6, 2), Repeated(6, 2))
    with pytest.raises(UsageError, match="these are all of its 6 heads"):
        masked(program, "prune:drop=layers.0/kv_heads/0+1")
    with pytest.raises(UsageError, match="it has kv_heads 0 to 1, not 2"):
        masked(program, "prune:drop=layers.0/kv_heads/2")


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "spec",
    [
        "prune:heads=0.25:ffn=0.3",
        "prune:layers=0.5:criterion=taylor",
        "prune:channels=0.125:criterion=bn_scale:scope=global:round_to=16",
        "prune:heads=0.5:uniform=true",
        "prune:drop=model.layers.3.self_attn/heads/0+5;model.layers.4",
        "prune:ffn=0.1:plan=plans/a.json",
    ],
)
def test_a_pass_prints_as_it_is_written(spec):
    (step,) = parse_passes(spec)
    assert str(step) == spec and parse_passes(str(step)) == [step]


def test_drops_become_an_option_of_the_pass():
    (step, other) = with_drops(parse_passes("prune:ffn=0.1,int8"), ["a.3:heads=0,5", "b.4"], "")
    assert str(step) == "prune:ffn=0.1:drop=a.3/heads/0+5;b.4" and other.name == "int8"
    assert parse_passes(str(step)) == [step]
    assert [str(p) for p in with_drops(parse_passes("int8"), ["b.4"], "")] == ["prune:drop=b.4", "int8"]
    assert with_drops([step], [], "") == [step]
    assert str(Prune(drop="a.3:heads=0,5")) == "prune:drop=a.3/heads/0+5"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("prune:heads=1.5", "is not a share"),
        ("prune:ffn=1", "is not a share"),
        ("prune:ffn=-0.1", "is not a share"),
        ("prune:ffn=nan", "is not a share"),
        ("prune:channels=many", "is not a float"),
        ("prune:ffn=0.5:round_to=0", "is not a positive number"),
        ("prune:ffn=0.5:round_to=1.5", "is not a int"),
        ("prune:ffn=0.5:uniform=true:scope=global", "uniform=true keeps the layers alike"),
        ("prune:ffn=0.5:uniform=yes", "is not a bool"),
        ("prune:ffn=0.5:criterion=best", "one of auto, l2, l1, bn_scale, taylor, wanda, mask_gradient"),
        ("prune:ffn=0.5:scope=world", "one of layer, global"),
        ("prune:toes=0.5", "its options: amount, budget, heads, ffn"),
        ("prune:drop=a/toes/1", "one of heads"),
    ],
)
def test_options_that_make_no_sense(spec, says):
    with pytest.raises(UsageError) as caught:
        parse_passes(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["ffn=0.5:criterion=taylor", "ffn=0.5:criterion=wanda", "ffn=0.5:criterion=mask_gradient", "layers=0.5"]
)
def test_missing_data_is_asked_for(spec):
    (step,) = parse_passes(f"prune:{spec}")
    assert step.uses_data()
    with pytest.raises(UsageError, match="measured on calibration data, and there is none") as caught:
        step.run(three_layers().copy(), Context())
    assert "--calib" in str(caught.value)


@pytest.mark.parametrize("spec", ["ffn=0.5", "ffn=0.5:criterion=bn_scale", "drop=a.1:criterion=taylor"])
def test_what_needs_no_data_does_not_ask(spec):
    assert not parse_passes(f"prune:{spec}")[0].uses_data()


def test_weights_on_meta_cannot_be_ranked():
    program = three_layers().copy()
    program.constants = {fqn: t.to("meta") for fqn, t in program.constants.items()}
    with pytest.raises(UsageError, match="meta"):
        Prune(ffn=0.5).run(program, Context())


def test_a_kind_that_is_not_there_is_said_to_be():
    _, result = masked(three_layers(), "prune:heads=0.5:ffn=0.5")
    assert [r.reason for r in result.refusals] == ["the model has no heads that can be pruned by l2"]
    with pytest.raises(UsageError, match="the model has no channels"):
        run_passes(three_layers(), parse_passes("prune:channels=0.5"), Context())
    _, result = masked(three_layers(), "prune:ffn=0.5:criterion=bn_scale")
    assert {r.reason for r in result.refusals} >= {"bn_scale says nothing about it"}


# ---------------------------------------------------------------------------------------------------------- end to end


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
