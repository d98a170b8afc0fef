"""The rate as training goes on, against torch's own schedules, and numbers that make no sense."""

from __future__ import annotations

import pytest
import torch

from fxc.errors import UsageError
from fxc.train.plan import FIRST, LEAST, Plan

STEPS = 200


def reference(schedule: str, warm: int) -> list[float]:
    """The factors by which torch.optim.lr_scheduler multiplies a rate of 1, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kinds = torch.optim.lr_scheduler
    rest = STEPS - warm
    after = {
        "cosine": lambda: kinds.CosineAnnealingLR(optimizer, rest, eta_min=0.0),
        "linear": lambda: kinds.LinearLR(optimizer, 1.0, 1e-12, rest),
        "constant": lambda: kinds.ConstantLR(optimizer, 1.0, 0),
    }[schedule]()
    rates = [at / warm for at in range(warm)]
    for _ in range(rest):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_rates_are_those_of_torch(schedule, warmup):
    plan = Plan(schedule=schedule, warmup=warmup)
    warm = round(warmup * STEPS)
    for step, expected in enumerate(reference(schedule, warm)):
        least = FIRST if step < warm else LEAST
        assert plan.rate_at(step / STEPS) == pytest.approx(max(expected, least), abs=1e-6), step


def test_kinds_have_their_own_rates():
    plan = Plan(vector_rate=0.5, scale_rate=3.0)
    assert [plan.factor(kind) for kind in ("weight", "vector", "scale")] == [1.0, 0.5, 3.0]


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"accumulate": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"max_norm": 0.0}, {"minutes": -1.0},
     {"patience": -1}, {"warmup": 1.0}, {"scale_rate": float("inf")}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError) as refused:
        Plan(**wrong)
    assert refused.value.where in wrong
