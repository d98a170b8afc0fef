"""Timing. Every contender is measured once a round, in alternating order, so that noise and clocks hit all alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from fxc.kernel_bench.contender import Call

# A thread pool (OpenMP, ONNX Runtime, TBB) spins for some milliseconds after its last work, on the next one's cores.
SETTLE_SECONDS = 0.02
# Calls in a captured graph, at least; what a launch from the CPU costs is then divided by as many. Of calls that take a whole
# round each, it costs nothing that could be seen, and two will do.
GRAPH_CALLS = 20
FEW_CALLS = 2
# A round of a captured graph takes so long at least, because events count in steps of half a microsecond.
ROUND_US = 2000.0
# Clocks that differ by more than this between the start and the end of a race make it worthless.
DRIFT = 0.05
RETRIES = 2


@dataclass(frozen=True)
class Telemetry:
    """What nvidia-smi says while the device works."""

    sm_mhz: float
    power_w: float
    temperature_c: float


@dataclass
class Race:
    """rounds: name -> microseconds of one call, a number for each round, all of the same length; discarded: why they do not
    count."""

    rounds: dict[str, list[float]]
    telemetry: list[Telemetry] = field(default_factory=list)
    discarded: str | None = None


class Clock(Protocol):
    def prepare(self, calls: Sequence[Call]) -> Any:
        """Copies of one contender (each has its own weight), made ready for `race`. The first has been called before, and so
        is compiled. May raise whatever the contender raises."""

    def race(self, prepared: dict[str, Any], rounds: int, watch: bool = True) -> Race:
        """Time what was prepared. watch: see to it that the device's clocks stay what they are, which takes a while."""


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy has it."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def alternating(names: Sequence[str], rounds: int) -> list[str]:
    """The names once a round, every other round in reverse: none always runs after the same neighbour."""
    return list(itertools.chain.from_iterable(names if turn % 2 == 0 else reversed(names) for turn in range(rounds)))


@dataclass
class CpuClock:
    """A round is the median of calls that go on for `seconds`, after one that warms the caches again."""

    seconds: float = 0.04
    settle: float = SETTLE_SECONDS

    def prepare(self, calls: Sequence[Call]) -> Any:
        for call in calls:
            call()
        return itertools.cycle(calls)

    def race(self, prepared: dict[str, Any], rounds: int, watch: bool = True) -> Race:
        result = Race({name: [] for name in prepared})
        for name in alternating(list(prepared), rounds):
            result.rounds[name].append(1e6 * self._round(prepared[name]))
        return result

    def _round(self, calls: Any) -> float:
        time.sleep(self.settle)
        first = _seconds(next(calls))
        if first > self.seconds:
            return first  # so long a call leaves nothing of what was in the caches before it
        spent: list[float] = []
        while sum(spent) < self.seconds:
            spent.append(_seconds(next(calls)))
        return median(spent)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Runner(Protocol):
    """What `GraphClock` asks of a device (`fxc.kernel_bench.cuda_runner` is the real one)."""

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """Run each once, record them all into a graph, and give what replays it."""

    def microseconds(self, replay: Callable[[], object], repeats: int) -> float:
        """Device time of so many replays, or calls."""

    def telemetry(self, replay: Callable[[], None], repeats: int) -> Telemetry | None:
        """What the device says while it replays; None where nothing says it."""


@dataclass
class GraphClock:
    """A round replays a CUDA graph of calls that go through all copies, so that each weight comes from memory and not from
    the L2."""

    runner: Runner

    def prepare(self, calls: Sequence[Call]) -> Any:
        is_long = self.runner.microseconds(calls[0], 1) > ROUND_US
        count = max(FEW_CALLS if is_long else GRAPH_CALLS, len(calls))
        many = list(itertools.islice(itertools.cycle(calls), count))
        # The calls are kept, because the graph reads their inputs where they are.
        return self.runner.capture(many), count, calls

    def race(self, prepared: dict[str, Any], rounds: int, watch: bool = True) -> Race:
        """A race in which the SM clock drifted is run again, RETRIES times at most."""
        result = self._race(prepared, rounds, watch)
        for _ in range(RETRIES):
            if result.discarded is None:
                break
            result = self._race(prepared, rounds, watch)
        return result

    def _race(self, prepared: dict[str, Any], rounds: int, watch: bool) -> Race:
        if not prepared:
            return Race({})
        # The first replay of each is not counted, and says how many make a round.
        alone = {name: self.runner.microseconds(replay, 1) for name, (replay, *_) in prepared.items()}
        repeats = {name: max(1, round(ROUND_US / max(spent, 1.0))) for name, spent in alone.items()}
        busiest = max(alone, key=alone.__getitem__)
        busy = prepared[busiest][0], max(1, round(3e5 / max(alone[busiest], 1.0)))
        result = Race({name: [] for name in prepared})
        before = self.runner.telemetry(*busy) if watch else None
        for name in alternating(list(prepared), rounds):
            replay, count, _ = prepared[name]
            result.rounds[name].append(self.runner.microseconds(replay, repeats[name]) / repeats[name] / count)
        after = self.runner.telemetry(*busy) if before else None
        if before and after:
            result.telemetry = [before, after]
            drift = abs(after.sm_mhz - before.sm_mhz) / max(after.sm_mhz, before.sm_mhz)
            if drift > DRIFT:
                result.discarded = f"the SM clock went from {before.sm_mhz:.0f} to {after.sm_mhz:.0f} MHz, {drift:.0%}"
        return result
