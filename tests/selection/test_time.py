"""How long a search takes: within the time given, and in proportion to the layers, counted in evaluations."""

from __future__ import annotations

import pytest
import torch
from choosable import FORMATS, Small
from torch import nn

import fxc
from fxc.captured import capture_source
from fxc.measure.quality import evaluation_of
from fxc.options import Options
from fxc.selection import errors, influence, trials
from fxc.selection.formats import parse_formats
from fxc.selection.prediction import predictions_of
from fxc.selection.trials import Plan, Trials


def test_what_there_was_no_time_for_is_said_and_the_first_trial_is_made(data):
    given = {"formats": FORMATS, "trials": 6, "verify": False, "calib": data, "eval": data[4:]}
    found = fxc.search(Small().eval(), (data[0],), budget="size=0.5x", minutes=1e-9, **given)
    assert [each.plan.kind for each in found.trials] == ["predicted"] and found.best is found.trials[0]
    assert found.ended_by == "the time is up (--minutes)"
    assert {each.partition(":")[0] for each in found.untried} >= {"uniform", "predicted", "swapped"}
    assert found.as_json()["untried"] == found.untried


class Clock:
    """What time it is said to be."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_no_trial_begins_that_would_end_too_late(captured, data, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trials, "time", clock)
    made = Trials(captured, Options("", verify=False), None, evaluation_of(captured, data[4:]), 9, until=100.0)
    took = iter([40.0, 20.0, 30.0])

    def measured(plan: Plan) -> tuple:
        clock.now += next(took)
        return trials.Trial(plan), None

    monkeypatch.setattr(made, "measured", measured)
    plan = Plan((), "float", "uniform")
    made.run(plan)
    assert made.left == 8 and made.ended_by is None
    made.run(plan)
    assert made.left == 7, "at 60, and the longest took 40"
    clock.now += 1
    assert made.left == 0 and "time is up" in made.ended_by


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.fixture
def counted(monkeypatch):
    """How often a format was judged on a weight, and how often the model was run with noise."""
    found = {"judged": 0, "run": 0}

    def counting(name, function):
        def inner(*args):
            found[name] += 1
            return function(*args)

        return inner

    monkeypatch.setattr(errors, "_lost", counting("judged", errors._lost))
    monkeypatch.setattr(influence._Clean, "loss", counting("run", influence._Clean.loss))
    return found


def evaluations(counted: dict[str, int], layers: int) -> tuple[int, int]:
    counted.update(judged=0, run=0)
    data = list(torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)))
    options = Options("", calib=data, verify=False)
    captured = capture_source(Layers(layers).eval(), (data[0],), options)
    made = predictions_of(captured, options, parse_formats("int8:mode=weight_only;int4:group=32"))
    assert len(made.costs) == layers
    return counted["judged"], counted["run"]


def test_evaluations_grow_in_proportion_to_the_layers(counted):
    two, four, eight = (evaluations(counted, n) for n in (2, 4, 8))
    assert two[0] >= 2 * 3 and two[1] == 2 * 2 * 4, "noise and two formats; noise there and away, on four samples"
    assert four == tuple(2 * each for each in two) and eight == tuple(4 * each for each in two)


def test_runs_with_noise_are_shared_out_so_that_time_does_not_grow_with_the_square(counted, monkeypatch):
    monkeypatch.setattr(influence, "RUNS", 16)
    assert [evaluations(counted, n)[1] for n in (2, 4, 8)] == [16, 16, 16]
