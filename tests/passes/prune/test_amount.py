"""`prune` alone: how much goes, that it stays within the budget, and that it can be said again."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from families import build
from torch import nn

import fxc
from fxc.analysis.groups import groups
from fxc.captured import capture_source
from fxc.compiled.model import CompiledModel
from fxc.compiler import compile_captured
from fxc.data.samples import drawn
from fxc.errors import UsageError
from fxc.ir.observe import run
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.prune import amount as prune_amount
from fxc.passes.prune.amount import Judge, halves, judged_outputs, most_within
from fxc.passes.prune.prune import Prune, with_drops
from fxc.passes.prune.scores import scores


class Mlp(nn.Module):
    """A hidden layer in which every third unit says next to nothing."""

    def __init__(self, faint: float = 1e-3):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 48), nn.Linear(48, 6)
        with torch.no_grad():
            self.down.weight[:, ::3] *= faint

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def pruned(model, example, passes="prune", **options) -> tuple[CompiledModel, dict]:
    made = fxc.optimize(model, example, passes=passes, **options)
    return made, next(p for p in made.report["passes"] if p["name"].startswith("prune"))


def same(a: CompiledModel, b: CompiledModel) -> bool:
    equal = all(torch.equal(a.program.constants[name], tensor) for name, tensor in b.program.constants.items())
    return str(a.program) == str(b.program) and equal


def squared_error(after, before) -> float:
    return ((after - before).square().sum() / before.square().sum()).item()


# ----------------------------------------------------------------------------------------------------------- the amount


def test_what_says_nothing_goes_and_the_outputs_stay_within_the_budget():
    model = Mlp()
    made, step = pruned(model, (X[:4],), calib=X)
    (removed,) = step["removed"]
    assert 16 <= removed["removed"] <= 24 and removed["before"] == 48
    assert made.program.constants["up.weight"].shape[0] == 48 - removed["removed"]
    held_out = X[32:]
    assert 0 < squared_error(made(held_out), model(held_out)) <= 0.02
    assert f"{removed['removed']} of 48 FFN channels go" in step["notes"][0] and "held-out calibration" in step["notes"][0]


def test_more_goes_for_a_larger_budget_and_never_more_than_half():
    gone = [sum(r["removed"] for r in pruned(Mlp(1.0), (X,), f"prune:budget={b}")[1]["removed"]) for b in (0.01, 0.1, 9)]
    assert gone[0] < gone[1] < gone[2] == 24


def test_the_same_is_chosen_again():
    assert pruned(Mlp(), (X,))[1]["repeat"] == pruned(Mlp(), (X,))[1]["repeat"]


def test_channels_of_convolutions_go_too():
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        cnn[7].weight[:, :6] *= 1e-3
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    made, step = pruned(cnn, (images[:2],), calib=images)
    assert sum(r["removed"] for r in step["removed"]) >= 6 and all(2 * r["removed"] <= r["before"] for r in step["removed"])
    assert squared_error(made(images[4:]), cnn(images[4:])) <= 0.02


@pytest.mark.parametrize("name", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "vit"))])
def test_every_kind_of_model_is_judged_and_the_choice_can_be_repeated(name):
    made, step = pruned(*build(name), "int8,prune:budget=0.3")
    assert step["changed"] > 0 and all(2 * r["removed"] <= r["before"] for r in step["removed"])
    assert {"head", "ffn"} <= {r["kind"] for r in step["removed"]}
    assert any("no calibration data" in note and "real data" in note for note in step["notes"])
    again = fxc.optimize(*build(name), passes=f"int8,{step['repeat']}")
    assert same(made, again)


def test_the_plan_in_the_artifact_repeats_it(tmp_path):
    made, _ = pruned(Mlp(), (X,))
    made.save(tmp_path / "out")
    plan = tmp_path / "out" / "plan.json"
    assert json.loads(plan.read_text())["drop"]
    assert same(made, fxc.optimize(Mlp(), (X,), passes=[Prune(plan=str(plan))]))
    assert "plan.json" not in fxc.load(tmp_path / "out").files


def test_a_choice_among_groups_that_begin_in_one_weight_can_be_repeated():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.a, self.b = nn.Linear(6, 24, bias=False), nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x):
            first, second = self.up(x).split(12, -1)
            return self.a(torch.relu(first)) * self.b(torch.tanh(second))

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    names = [(g.name, g.kind) for g in groups(fxc.capture(Fused(), (x,)))]
    assert len(set(names)) == len(names)
    made, step = pruned(Fused(), (x,), "prune:budget=0.5")
    assert len(step["removed"]) == 2
    assert same(made, fxc.optimize(Fused(), (x,), passes=step["repeat"]))


def test_uniform_and_multiples_hold_within_a_budget():
    made, step = pruned(*build("qwen2"), "prune:budget=1:uniform=true:round_to=32")
    counts = {kind: {r["removed"] for r in step["removed"] if r["kind"] == kind} for kind in ("head", "ffn")}
    assert all(len(each) == 1 for each in counts.values())
    assert made.config.intermediate_size % 32 == 0 and made.config.intermediate_size >= 80
    ((_, multiple),) = [(r["scope"], r) for r in pruned(Mlp(), (X,), "prune:round_to=10")[1]["removed"]]
    assert (48 - multiple["removed"]) % 10 == 0 and multiple["removed"] <= 24


@pytest.mark.parametrize("criterion", ["l1", "l2", "wanda", "mask_gradient", "taylor"])
def test_any_criterion_can_rank(criterion):
    _, step = pruned(Mlp(), (X,), f"prune:criterion={criterion}:budget=0.1", calib=X)
    # Magnitudes count the weights into a unit too, which are like all others here.
    assert step["changed"] >= (1 if criterion in ("l1", "l2") else 16)


def test_without_gradients_magnitudes_rank_and_that_is_said(monkeypatch):
    def no_gradients(program, groups, criterion, samples=(), track=None, seed=0):
        if criterion == "taylor":
            raise RuntimeError("derivative for aten::what is not implemented")
        return scores(program, groups, criterion, samples)

    monkeypatch.setattr(prune_amount, "scores", no_gradients)
    _, step = pruned(Mlp(), (X,), "prune:budget=0.1")
    assert step["changed"] > 0
    assert any("ranked by l2" in note and "aten::what is not" in note for note in step["notes"])


# ---------------------------------------------------------------------------------------------- where nothing can go


def test_where_nothing_can_go_the_other_passes_go_on():
    made, step = pruned(Mlp(1.0), (X,), "int8,prune:budget=1e-9")
    assert step["changed"] == 0 and step["repeat"] is None and "nothing can go within the budget" in step["notes"][0]
    assert "would cost" in step["notes"][0] and "up.qweight" in made.program.constants
    _, step = pruned(nn.Linear(64, 64), (torch.randn(2, 64),), "int8,prune")
    assert "nothing that can be pruned" in step["notes"][0]


def test_what_was_tried_and_what_was_kept_is_said():
    _, step = pruned(Mlp(), (X,), "prune:amount=auto:budget=0.02", calib=X)
    tried = {int(n): float(cost) for n, cost in re.findall(r" (\d+): ([\d.]+)%", step["notes"][1])}
    assert "in steps of 24 to half" in step["notes"][1] and next(iter(tried)) == 24 and len(tried) > 2
    kept = max(n for n, cost in tried.items() if cost <= 2)
    assert step["notes"][1].endswith(f"kept {kept}, the most that is within it") and kept == step["changed"]
    assert all(cost > 2 for n, cost in tried.items() if n > kept)


def test_where_nothing_fits_the_budget_nothing_is_pruned_and_that_is_said():
    model = Mlp(1.0)
    made, step = pruned(model, (X,), "prune:amount=auto:budget=1e-9", calib=X)
    assert step["changed"] == 0 and not step["removed"] and torch.equal(made.program.constants["up.weight"], model.up.weight)
    assert "nothing can go within the budget of 1e-07%" in step["notes"][0]
    assert step["notes"][1].endswith("none is within it: nothing is pruned") and " 1: " in step["notes"][1]


def test_outputs_of_integers_cannot_be_judged():
    class Label(Mlp):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    _, step = pruned(Label(), (X,))
    assert step["changed"] == 0 and "no output has floating-point numbers" in step["notes"][0]


def test_skipped_layers_keep_everything():
    model, _ = build("bert")
    _, step = pruned(model, None, "prune:budget=0.3", skip=["*.layer.0*", "*.pooler*"])
    assert step["removed"] and all("layer.1" in r["scope"] for r in step["removed"])


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "spec",
    ["prune:amount=auto:heads=0.5", "prune:budget=0.1:ffn=0.5", "prune:amount=auto:drop=a.b", "prune:amount=auto:layers=0.2",
     "prune:budget=-1", "prune:budget=inf", "prune:budget=nan", "prune:amount=some"],
)  # fmt: skip
def test_amounts_that_contradict_each_other_are_refused(spec):
    with pytest.raises(UsageError, match=r"says it|share of the loss|not a value"):
        parse_passes(spec)


def test_decisions_from_outside_win_over_prune_alone():
    (step,) = with_drops(parse_passes("prune"), ["a.b:ffn=1"], "")
    assert step == Prune(drop="a.b/ffn/1") and not step.is_auto
    assert [str(p) for p in parse_passes("prune,prune:amount=auto,prune:budget=0.05")] == [
        "prune", "prune:amount=auto", "prune:budget=0.05",
    ]  # fmt: skip


def test_the_gates_budget_limits_the_choice_too():
    free = pruned(Mlp(1.0), (X,), "prune:budget=1")[1]
    held = pruned(Mlp(1.0), (X,), "prune:budget=1", budget=0.15)[1]
    assert 0 < held["changed"] < free["changed"] and "budget 0.15" in held["gates"]["meaning"]


# ---------------------------------------------------------------------------------------------------- how it is judged


def test_bisection_finds_the_last_step_that_fits():
    for last, limit in ((0, 0), (1, 0), (1, 1), (37, 0), (37, 1), (37, 20), (37, 37), (5000, 0), (5000, 1)):
        assert most_within(last, limit.__ge__) == limit
    assert 3000 - 5000 // 256 <= most_within(5000, (3000).__ge__) <= 3000


def test_progress_is_shown_of_reading_ranking_and_trying():
    said = []

    def track(items, what, count):
        taken = list(items)
        said.append((what, len(taken), count))
        return taken

    model = capture_source(Mlp(1.0), (X,))
    samples = list(X.split(8))
    compile_captured(model, Options("prune:budget=0.1", calib=samples), track=track)
    read, scored, tried = said
    assert read == ("reading calibration samples", 8, 8)
    assert scored == ("scoring units by taylor", 4, 4)
    assert tried[0] == "trying how much can go" and 1 < tried[1] <= tried[2]


def test_the_judge_sees_what_zeroed_weights_do():
    """By masks on activations, where the pass zeroes columns."""
    model = Mlp(1.0)
    program = fxc.capture(model, (X,))
    (group,) = (g for g in groups(program) if g.kind == "ffn")
    units = torch.tensor([0, 7, 30])
    judge = Judge(program, [group], [[X[:32]], [X[32:]]], by_loss=False)
    found = judge.cost({group: units})
    assert judge.cost({}) == 0
    with torch.no_grad():
        before = model(X)
        model.down.weight[:, units] = 0
        expected = squared_error(model(X), before)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_decoder_is_judged_by_the_loss_of_its_data_and_else_by_its_own_texts():
    program = fxc.capture(build("qwen2")[0])
    its = [g for g in groups(program) if g.kind == "ffn"]
    units = {g: torch.arange(80) for g in its}
    samples = drawn(program, 4)
    masked = program.copy()
    Prune(drop=";".join(f"{g.name}/ffn/{'+'.join(map(str, range(80)))}" for g in its)).run(masked, Context())

    def logits(p):
        return torch.cat([run(p, inputs)[0] for inputs in samples]).double().log_softmax(-1)

    before, after = logits(program), logits(masked)
    ids = torch.cat([inputs[0] for inputs in samples])
    losses = [-each[:, :-1].gather(-1, ids[:, 1:, None]).sum() for each in (before, after)]
    by_loss = Judge(program, its, samples, by_loss=True).cost(units)
    assert by_loss == pytest.approx((losses[1] / losses[0] - 1).item(), rel=1e-3, abs=1e-6)
    p = before.exp()
    own = Judge(program, its, samples, by_loss=False).cost(units)
    assert own == pytest.approx(((p * (before - after)).sum() / -(p * before).sum()).item(), rel=1e-3)


def test_padding_does_not_count_as_loss():
    program = fxc.capture(build("qwen2")[0])
    its = [g for g in groups(program) if g.kind == "ffn"]
    (sample,) = drawn(program, 1)
    padded = [torch.nn.functional.pad(t, (3, 0)) if i < 3 else t for i, t in enumerate(sample)]
    units = {g: torch.arange(100) for g in its}
    costs = [Judge(program, its, [s], by_loss=True).cost(units) for s in (sample, padded)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3, abs=1e-7)


def test_texts_of_one_token_have_no_loss():
    with pytest.raises(UsageError, match="no next token"):
        pruned(*build("qwen2"), calib=[{"input_ids": torch.tensor([[5]])}] * 4)


def test_a_decoder_writes_its_texts_over_its_own_cache():
    """What it is asked for again, at once and without a cache, is what it drew from."""
    program = fxc.capture(build("gpt2")[0])
    first, second = drawn(program, 6), drawn(program, 6)
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert len({tuple(s[0].flatten().tolist()) for s in first}) == 6 and first[0][0].shape == (1, 32)


def test_logits_are_judged_as_distributions_and_all_else_as_numbers():
    assert judged_outputs(fxc.capture(build("bert")[0])) == {0: -1}
    assert judged_outputs(fxc.capture(Mlp(), (X,))) == {0: None}
    decoder = fxc.capture(build("qwen2")[0])
    assert [decoder.signature.outputs[i] for i in judged_outputs(decoder)] == ["logits"]


def test_numbers_that_are_lost_cost_everything():
    program = fxc.capture(Mlp(), (X,))
    (group,) = (g for g in groups(program) if g.kind == "ffn")
    judge = Judge(program, [group], [[torch.full((2, 12), math.nan)]], by_loss=False)
    assert judge.cost({}) == 0, "what was not finite before says nothing"
    judge._before = [{0: torch.zeros(2, 6)}]
    assert judge.cost({}) == math.inf


def test_data_is_halved():
    program = fxc.capture(Mlp(), (X,))
    ranking, judging = halves(program, [[X[i : i + 1]] for i in range(5)])
    assert [len(ranking), len(judging)] == [3, 2]
    ranking, judging = halves(program, [[X]])
    assert torch.equal(torch.cat([ranking[0][0], judging[0][0]]), X) and len(ranking[0][0]) == 32
    ranking, judging = halves(program, [[X[:1]]])
    assert ranking is judging
