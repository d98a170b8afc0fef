"""Clocks, by calls and runners that take as long as they say."""

import itertools

import pytest

from fxc.kernel_bench import clock, cuda_runner
from fxc.kernel_bench.clock import CpuClock, GraphClock, Telemetry


def test_a_round_on_the_cpu_is_the_median_after_one_call_that_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.time, "sleep", lambda _: None)
    durations, log = itertools.cycle([0.09, 0.2, 0.4, 0.6]), []

    def call(name, spent=None):
        def run():
            log.append(name)
            now[0] += next(durations) if spent is None else spent

        return run

    timer = CpuClock(seconds=1.0)
    race = timer.race({"a": itertools.cycle([call("a")]), "b": itertools.cycle([call("b0", 3.0), call("b1", 3.0)])}, rounds=2)
    assert race.rounds["a"] == pytest.approx([0.4e6, 0.4e6]), "the first call, which warms the caches, does not count"
    assert race.rounds["b"] == pytest.approx([3e6, 3e6])
    # Copies take turns, every other round is reversed, and a long call is made once.
    assert log == ["a"] * 4 + ["b0", "b1"] + ["a"] * 4
    timer.prepare([call("c", 1.0), call("d", 1.0)])
    assert log[-2:] == ["c", "d"], "every copy has run before it is timed"


class FakeRunner:
    """A GPU on which a call takes `us` microseconds, or as many as it has itself, and a graph those of its calls. clocks: the
    SM clock at each time that it is asked for."""

    def __init__(self, clocks=(), us=10.0):
        self.clocks, self.us, self.captured, self.replays = iter(clocks), us, [], 0

    def capture(self, calls):
        self.captured.append([call() for call in calls])

        def replay():
            self.replays += 1

        replay.us = sum(getattr(call, "us", self.us) for call in calls)
        return replay

    def microseconds(self, replay, repeats):
        for _ in range(repeats):
            replay()
        return repeats * getattr(replay, "us", self.us)

    def telemetry(self, replay, repeats):
        found = next(self.clocks, None)
        return found and Telemetry(found, 400.0, 50.0)


def test_a_graph_goes_through_all_copies_and_has_twenty_calls_at_least():
    runner = FakeRunner()
    timer = GraphClock(runner)
    prepared = timer.prepare([lambda: "a", lambda: "b", lambda: "c"])
    assert runner.captured[0] == ["a", "b", "c"] * 6 + ["a", "b"]
    many = timer.prepare([lambda at=at: at for at in range(33)])

    def long():
        return "long"

    long.us = 2001.0
    timer.prepare([long])
    assert runner.captured.pop() == ["long"] * 2, "of long calls two are enough"
    assert runner.captured[1] == list(range(33))
    race = timer.race({"few": prepared, "many": many}, rounds=3)
    assert race.rounds == {"few": [10.0] * 3, "many": [10.0] * 3} and race.telemetry == [] and race.discarded is None
    # A replay of 200 microseconds is repeated ten times a round, one of 330 six times, and each once before.
    assert runner.replays == 3 * (10 + 6) + 2


@pytest.mark.parametrize(
    ("clocks", "asked", "discarded"),
    [
        ([1980.0, 1950.0], 2, False),
        ([1980.0, 1800.0, 1800.0, 1790.0], 4, False),
        ([1980.0, 1800.0, 1700.0, 1500.0, 1500.0, 1200.0], 6, True),
    ],
)
def test_a_race_in_which_the_clock_drifts_is_run_again_and_in_the_end_thrown_away(clocks, asked, discarded):
    runner = FakeRunner(clocks)
    timer = GraphClock(runner)
    race = timer.race({"a": timer.prepare([lambda: None])}, rounds=1)
    assert bool(race.discarded) == discarded and [each.sm_mhz for each in race.telemetry] == clocks[asked - 2 : asked]
    assert next(runner.clocks, None) is None
    assert timer.race({"a": timer.prepare([lambda: None])}, rounds=1, watch=False).telemetry == []
    if discarded:
        assert race.discarded == "the SM clock went from 1500 to 1200 MHz, 20%"


def test_what_nvidia_smi_says():
    assert cuda_runner.parse_telemetry("1980, 312.40, 45") == Telemetry(1980.0, 312.4, 45.0)
    assert cuda_runner.parse_telemetry("[N/A], 312.40, 45") is None and cuda_runner.parse_telemetry("") is None


def test_percentiles_are_between_the_two_nearest():
    assert [clock.percentile([4.0, 1.0, 2.0, 3.0], share) for share in (0, 0.2, 0.5, 1)] == [1.0, 1.6, 2.5, 4.0]
