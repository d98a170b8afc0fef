"""The loop: what a step is, what is kept, when it ends, and that it goes on where it was."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from formats import generator, normal
from torch import Tensor, nn

from fxc.calibrate.journal import saving
from fxc.errors import VerificationFailed
from fxc.train.loop import HOPELESS, Pieces, train
from fxc.train.plan import Plan
from fxc.train.precision import GROWTH, autocast

X, AIM = normal(64, 12), normal(64, 3, seed=1) * 0.3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def pieces(net: nn.Module, precision: str = "float32", parts: int = 1, given=None) -> Pieces:
    """Batches of 16 rows. given: what the loss of a batch, by its number, is multiplied by."""

    def loss(rows: Tensor) -> Tensor:
        with autocast(precision):
            made = net(X[rows])
        return (made.float() - AIM[rows]).square().mean()

    def lost(batch: int):
        rows = torch.randperm(48, generator=generator(batch))[:16]
        for part in rows.chunk(parts):
            yield loss(part) * (len(part) / len(rows)) * (given(batch) if given else 1.0)

    @torch.no_grad()
    def judged() -> float:
        return float(loss(torch.arange(48, 64)))

    return Pieces(lost, judged, lambda batch: 16)


def trained(plan: Plan, parts: int = 1, given=None, **options):
    net = Small()
    fit = train(dict(net.named_parameters()), pieces(net, plan.precision, parts, given), plan, **options)
    return net, fit


def gap(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_a_step_is_one_of_adamw_on_clipped_gradients():
    plan = Plan(steps=20, looks=1, max_norm=0.05, rate=3e-3, weight_decay=0.1)
    net, fit = trained(plan)
    plain = Small()
    source = pieces(plain)
    weights = [each for each in plain.parameters() if each.ndim > 1]
    vectors = [each for each in plain.parameters() if each.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * plan.rate_at(step / 20)
        optimizer.zero_grad()
        sum(source.lost(step)).backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05
        optimizer.step()
    assert fit.after == pytest.approx(source.judged(), rel=1e-6) and fit.after < fit.before and gap(net, plain) < 1e-6


def test_parts_of_a_batch_are_the_batch():
    plan = Plan(steps=20, rate=3e-3)
    (whole, one), (parts, other) = trained(plan), trained(plan, parts=4)
    assert gap(whole, parts) < 1e-5 and one.after == pytest.approx(other.after, rel=1e-4)


def test_every_precision_reaches_the_same_loss():
    after = {each: trained(Plan(steps=200, rate=3e-3, precision=each))[1].after for each in ("float32", "bfloat16", "float16")}
    assert after["float32"] < 0.7 * trained(Plan(steps=1))[1].before
    for precision, loss in after.items():
        assert loss == pytest.approx(after["float32"], rel=0.05), precision


def test_an_overflow_is_no_step_and_halves_the_scale(monkeypatch):
    """In float16 gradients overflow at first: the scale falls until they do not, and grows again later."""
    scales = []
    true = torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: (true(self), scales.append(self.get_scale()))[0])
    # What is multiplied by 1 / scale of the loss in float16 is above 65504 for a loss of hundreds.
    net, fit = trained(Plan(steps=GROWTH + 10, rate=1e-3, precision="float16"), given=lambda batch: 50.0)
    assert fit.skipped == sum(b < a for a, b in zip([65536.0, *scales], scales)) > 0
    assert len(scales) == fit.steps + fit.skipped and fit.steps == GROWTH + 10
    assert any(b == 2 * a for a, b in pairwise(scales)), "the scale never grew"
    assert fit.after < fit.before and all(each.isfinite().all() for each in net.parameters())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_is_left_out(precision):
    plan = Plan(steps=10, looks=1, precision=precision)
    net, fit = trained(plan, given=lambda batch: math.nan if batch == 4 else 1.0)
    assert (fit.steps, fit.skipped, fit.stopped) == (10, 1, None) and fit.after < fit.before
    assert all(each.isfinite().all() for each in net.parameters())


def test_nothing_but_infinities_ends_it_with_the_best_so_far():
    net, fit = trained(Plan(steps=40, looks=4), given=lambda batch: 1.0 if batch < 10 else math.inf)
    assert (fit.steps, fit.skipped) == (10, HOPELESS) and "not finite" in fit.stopped
    assert fit.after == pieces(net).judged() < fit.before
    with pytest.raises(VerificationFailed, match="not finite"):
        trained(Plan(steps=40), given=lambda batch: math.inf, first_counts=False, settled=1.0)


def test_the_best_is_kept_and_patience_ends_it():
    plan = Plan(steps=100, rate=0.5, schedule="constant", looks=20, patience=3)
    net, fit = trained(plan)
    seen = [fit.before, *(point.held_out for point in fit.curve)]
    assert fit.after == min(seen) == pieces(net).judged()
    assert fit.steps < 100 and "3 looks" in fit.stopped
    assert len(seen) - 1 - seen.index(min(seen)) == 3


def test_kinds_go_at_their_own_rates_and_only_weights_decay():
    start = Small()
    kinds = {"up.bias": "scale", "down.bias": "vector"}
    plan = Plan(steps=1, looks=1, schedule="constant", warmup=0.0, rate=1e-3, weight_decay=0.5, scale_rate=4.0)
    before = {name: each.detach().clone() for name, each in start.named_parameters()}
    state = []
    parameters = dict(start.named_parameters())
    source = pieces(start)
    judge = lambda: state.append({name: each.detach().clone() for name, each in parameters.items()}) or float(-len(state))  # noqa: E731
    train(parameters, Pieces(source.lost, judge), plan, kinds=kinds)
    moved = {name: (state[-1][name] - before[name]).abs() for name in before}
    # The first step of Adam is as long as its rate.
    assert moved["up.bias"].max() == pytest.approx(4e-3, rel=1e-2)
    assert moved["down.bias"].max() == pytest.approx(1e-3, rel=1e-2)
    decayed = before["up.weight"] * (1 - 1e-3 * 0.5)
    assert (state[-1]["up.weight"] - decayed).abs().max() == pytest.approx(1e-3, rel=1e-2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_it_goes_on_to_the_same_bits(precision, tmp_path):
    plan = Plan(steps=37, looks=5, rate=0.05, precision=precision, patience=9)

    def run(folder, until: float = math.inf):
        def before_step(done: float) -> None:
            if done > until:
                raise Killed

        with saving(tmp_path / folder) as saves:
            journal = saves.journal({"it": precision})
            return (*trained(plan, before_step=before_step, journal=journal), journal.began)

    whole, fit, _ = run("whole")
    for until in (0.3, 0.7):
        with pytest.raises(Killed):
            run("killed", until)
    again, other, began = run("killed")
    assert began == 3 and gap(whole, again) == 0
    assert [(p.step, p.loss, p.held_out) for p in fit.curve] == [(p.step, p.loss, p.held_out) for p in other.curve]
    assert (fit.steps, fit.after, fit.skipped) == (other.steps, other.after, other.skipped)
    third, last, began = run("killed")
    assert began == 5 and gap(whole, third) == 0 and last == other


def test_minutes_count_what_an_earlier_process_took(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr("fxc.train.loop.time.monotonic", lambda: now[0])
    rates = []

    def before_step(done: float) -> None:
        now[0] += 1.0
        rates.append(done)
        if now[0] == 40:
            raise Killed

    with saving(tmp_path / "saves") as saves:
        with pytest.raises(Killed):
            trained(Plan(minutes=1.0, looks=4), before_step=before_step, journal=saves.journal({}))
        now[0] = 1000.0
        _, fit = trained(Plan(minutes=1.0, looks=4), before_step=before_step, journal=saves.journal({}))
    assert fit.curve[-1].seconds == pytest.approx(60, abs=3) and 50 < fit.steps <= 60
    assert now[0] - 1000 < 35 and rates[-1] == 1.0


def test_it_says_how_far_it_is():
    said = []

    def track(items, what, count):
        said.append((what, count))
        return items

    trained(Plan(steps=10, looks=3), track=track, what="recovering")
    assert [count for _, count in said] == [4, 3, 3]
    first, second = said[0][0], said[1][0]
    assert first.startswith("recovering, step 1 of 10, held-out loss 0.")
    assert "step 5 of 10, loss 0." in second and "samples a second" in second and second.endswith("s left")
