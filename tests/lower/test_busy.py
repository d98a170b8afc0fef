"""Races between the forms of a layer on a clock that the test moves: what a busy machine says is not believed, and not kept."""

import dataclasses
from itertools import cycle, repeat

import pytest
import torch
from int8_programs import program_of
from lowered import on_cpu
from torch import nn

from fxc.lower import choose
from fxc.lower.candidates import FLOAT, INT8, NATIVE_INT4, NATIVE_INT8
from fxc.report.lowering import describe

NOISE = choose._noise


class Clock:
    """In the place of `time`: it moves when a form runs."""

    def __init__(self):
        self.wall = self.worked = 0.0

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.worked

    def form(self, seconds, share=1.0):
        """What takes `seconds`, one after the other, of which the process runs so much."""
        seconds = iter(seconds)

        def run():
            spent = next(seconds)
            self.wall, self.worked = self.wall + spent, self.worked + share * spent

        return run


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("FXC_CACHE", str(tmp_path))
    choose.measure.cache_clear()
    found = Clock()
    monkeypatch.setattr(choose, "time", found)
    monkeypatch.setattr(choose, "_noise", NOISE)
    yield found
    choose.measure.cache_clear()


QUIET = (1.0e-4, 1.1e-4, 1.0e-4)


@pytest.mark.parametrize(
    ("first", "second", "share", "why"),
    [
        (QUIET, (2e-4,), 1.0, None),
        (QUIET, (2e-4,), 1.9, None),  # two threads
        (QUIET, (2e-4,), 0.5, "the process had 50% of a core"),
        ((1e-4, 2e-4, 2e-4), (2e-4,), 1.0, "calls of one form took 2.0 times as long as the fastest of them"),
        ((1e-4,), (2e-4, 4e-4, 4e-4), 1.0, "calls of one form took 2.0 times"),
        ((1.1e-4, 0.9e-4), (1e-4, 1e-4), 1.0, "two halves of a race disagree"),
        ((1e-4, 9e-4), (1e-2,), 1.0, None),  # ten times slower is no noise
        ((1e-4,), (1e-2,), 0.1, "the process had 10% of a core"),
    ],
)
def test_a_race_is_quiet_or_says_why_not(clock, first, second, share, why):
    times, noise = choose._race(*(clock.form(cycle(each), share) for each in (first, second)))
    assert (noise is None) if why is None else noise.startswith(why), noise
    assert len(times[0]) == len(times[1])


def test_one_disturbance_is_raced_again_and_a_lasting_one_is_not_for_ever(clock):
    calls = choose._ROUNDS[0] + 1
    once = clock.form([*(1e-3 * (1 + n % 2) for n in range(calls)), *repeat(1e-3, calls)])
    times, noise = choose._quiet_race(once, clock.form(repeat(2e-3)))
    assert noise is None and times[0] == pytest.approx([1e-3] * (calls - 1))
    started = []
    form = clock.form(cycle((1e-3, 2e-3, 3e-3)))
    _, noise = choose._quiet_race(lambda: started.append(clock.wall) or form(), clock.form(repeat(2e-3)))
    assert noise and len(started) == 3 * calls
    assert choose._quiet_race(clock.form(repeat(1e-4), 0.1), clock.form(repeat(1e-2), 0.1))[1] is None


def trial(clock, seconds, share):
    return lambda *layer: lambda x, whole: clock.form(cycle(seconds), share[0])


def test_a_busy_machine_decides_by_memory_for_one_load_and_the_next_measures_again(clock, monkeypatch, tmp_path):
    """float is faster, which a quiet machine says and keeps, and a busy one does not."""
    share = [0.4]
    forms = tuple(
        dataclasses.replace(form, trial=trial(clock, seconds, share), why_not=lambda group: None)
        for form, seconds in ((INT8, (4e-4,)), (FLOAT, (1e-4,)))
    )
    monkeypatch.setattr("fxc.lower.cpu.candidates", lambda group: forms)
    monkeypatch.setattr("fxc.lower.cpu.FLOAT", forms[1])
    compared = []
    compare = choose.compare
    monkeypatch.setattr(choose, "compare", lambda *layer: compared.append(layer) or compare(*layer))
    program = program_of(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(1, 3, 64))

    _, layers = on_cpu(program, bf16=False)
    why = "it holds the least, and could not be timed: the machine was busy (M=1: the process had 40% of a core)"
    assert [(each.op, each.reason) for each in layers] == [("int8", why)] * 2
    assert f"int8: {why}, as {layers[0].fqn}" in describe(layers)
    assert len(compared) == 1, "a layer like one that could not be timed is not tried again"
    assert not list(tmp_path.iterdir())

    share[0] = 1.0
    _, layers = on_cpu(program, bf16=False)
    assert {each.op for each in layers} == {"dequantized"} and "measured" not in layers[0].reason
    assert len(compared) == 2 and len(list(tmp_path.glob("timings-*.json"))) == 1
    share[0] = 0.4
    choose.measure.cache_clear()  # as in another process
    _, layers = on_cpu(program, bf16=False)
    assert {each.op for each in layers} == {"dequantized"} and len(compared) == 2


def test_the_form_of_the_fewest_bits_holds_the_least():
    why = choose.Busy("x")
    assert choose.by_memory((INT8, NATIVE_INT4, FLOAT), why).form is NATIVE_INT4
    assert choose.by_memory((NATIVE_INT8, INT8, FLOAT), why).form is NATIVE_INT8
