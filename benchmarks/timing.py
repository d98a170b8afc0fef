"""Interleaved timing: every contender is measured once per round, so that noise of a shared machine hits all alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# A thread pool (OpenMP, ONNX Runtime, TBB) spins for some milliseconds after its last work, on the next one's cores.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Call:
    """`run(prepare())` is one call; only `run` is timed. units: how many results one call gives, such as tokens."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    units: int = 1

    def __call__(self) -> Any:
        return self.run(self.prepare())


@dataclass
class Timing:
    """rounds: milliseconds per unit, one number per round: the median of that round's calls."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    def speedup_over(self, baseline: "Timing") -> float:
        """How many times faster than `baseline`: the median of the ratios within each round."""
        return median(theirs / ours for theirs, ours in zip(baseline.rounds, self.rounds, strict=True))


def time_once(call: Call) -> float:
    """Seconds of one run, its preparation left out."""
    prepared = call.prepare()
    start = time.perf_counter()
    call.run(prepared)
    return time.perf_counter() - start


def time_round(call: Call, seconds: float) -> float:
    """Median milliseconds per unit over calls until `seconds` are spent, after one that warms the caches again."""
    time.sleep(SETTLE_SECONDS)
    time_once(call)
    spent: list[float] = []
    while not spent or sum(spent) < seconds:
        spent.append(time_once(call))
    return median(spent) * 1e3 / call.units


def interleave(calls: dict[str, Call], rounds: int, seconds: float = 0.3, warmup: int = 3) -> dict[str, Timing]:
    """Time every call once per round, in alternating order: no call always runs after the same neighbour."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    timings = {name: Timing() for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            timings[name].rounds.append(time_round(calls[name], seconds))
    return timings
