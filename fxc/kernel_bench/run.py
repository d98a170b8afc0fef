"""The run: for each weight and number of rows, check every contender, then time them together."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from fxc.errors import first_line
from fxc.kernel_bench import limits, weights
from fxc.kernel_bench.clock import Clock, percentile
from fxc.kernel_bench.contender import Bind, Contender, fault
from fxc.kernel_bench.limits import Peaks
from fxc.kernel_bench.shapes import Shape, regime
from fxc.kernel_bench.weights import Weights, unfit

# Of the memory that is free, what the copies of all contenders may take.
MEMORY_SHARE = 0.8
SPENT = "the time that it may take was spent"


class Platform(Protocol):
    """Where it runs. name: "cpu" or a chip as tables of configurations have it, "nvidia-h200"."""

    name: str
    device: torch.device
    clock: Clock

    def contenders(self, schemes: tuple[str, ...]) -> list[Contender]: ...

    def copies(self, nbytes: float) -> int:
        """How many copies of a weight of so many bytes take turns, so that it is not read from a cache that is too near."""

    def free_memory(self) -> int: ...

    def measured_peaks(self, seconds: float) -> Peaks:
        """What it gives when it is tried, which takes `seconds` at most."""

    def datasheet(self) -> Peaks | None: ...

    def about(self) -> dict[str, Any]:
        """What has to be known of the machine, as JSON."""


@dataclass
class Row:
    """One contender at one size. state: "ok", "wrong", "failed" or "discarded", and why if not ok; form: how it runs; us, p20,
    p80: microseconds; speedup: over the fastest dense bfloat16 baseline of the same race, the median over its rounds;
    limit_us, fraction: the least that the product could take and what share of the time that is, by "datasheet" and by
    "measured" peaks; error: relative, of the result."""

    shape: str
    n: int
    k: int
    m: int
    regime: str
    scheme: str
    contender: str
    ours: bool
    baseline: bool
    state: str = "ok"
    reason: str = ""
    form: str = ""
    copies: int = 1
    error: float | None = None
    us: float | None = None
    p20: float | None = None
    p80: float | None = None
    speedup: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    limit_us: dict[str, float | None] = field(default_factory=dict)
    fraction: dict[str, float | None] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)


@dataclass
class Skipped:
    """A cell, or a contender at one, that was not run, and why."""

    what: str
    reason: str


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    telemetry: list[dict] = field(default_factory=list)

    def cell(self, shape: Shape, m: int) -> list[Row]:
        return [row for row in self.rows if (row.n, row.k, row.m) == (shape.n, shape.k, m)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """schemes: as in `weights.all_schemes`; rows: numbers of rows (tokens); deadline: of time.monotonic(), after which no new
    cell is begun."""

    shapes: tuple[Shape, ...]
    schemes: tuple[str, ...]
    rows: tuple[int, ...]
    rounds: int
    deadline: float | None = None


@dataclass
class Entrant:
    """A contender that was built: one bound weight for each copy."""

    contender: Contender
    weights: Weights
    binds: list[Bind]


class Tuner(Protocol):
    def entrants(self, shape: Shape, m: int, x: Tensor, held: dict[str, Weights]) -> list[Entrant]:
        """More contenders for one cell, such as the best configuration of a kernel."""


def run(
    sweep: Sweep, platform: Platform, note: Callable[[str], None] = lambda text: None, tuner: Tuner | None = None,
    peaks: Sequence[Peaks | None] = (), after: Callable[[Result], None] = lambda result: None, peers: Sequence[Contender] = (),
) -> Result:  # fmt: skip
    """Everything that `sweep` asks for. note: is told what is being done; peaks: (datasheet, measured) of the platform; after:
    is given what there is after each cell, in case that there is no end; peers: more contenders."""
    run = _Run(sweep, platform, note, tuner, dict(zip(("datasheet", "measured"), peaks)))
    run.run(after, peers)
    return run.result


class _Run:
    def __init__(self, sweep: Sweep, platform: Platform, note: Callable[[str], None], tuner: Tuner | None, peaks: dict):
        self.sweep, self.platform, self.note, self.tuner, self.peaks = sweep, platform, note, tuner, peaks
        self.result = Result()

    def run(self, after: Callable[[Result], None], peers: Sequence[Contender]) -> None:
        given = [*self.platform.contenders(self.sweep.schemes), *peers]
        schemes = list(dict.fromkeys(each.scheme for each in given))
        candidates = sorted(given, key=lambda each: schemes.index(each.scheme))
        self.result.absent = {each.name: why for each in candidates if (why := each.missing())}
        present = [each for each in candidates if each.name not in self.result.absent]
        for shape in self.sweep.shapes:
            try:
                self._shape(shape, present, after)
            except Exception as error:  # what one shape asks too much for, another may not
                self._skip(shape, failure(error))
            gc.collect()

    def _late(self) -> bool:
        return self.sweep.deadline is not None and time.monotonic() > self.sweep.deadline

    def _skip(self, what: object, reason: str) -> None:
        self.result.skipped.append(Skipped(str(what), reason))
        self.note(f"{what}: skipped, {reason}")

    def _shape(self, shape: Shape, present: list[Contender], after: Callable[[Result], None]) -> None:
        if self._late():
            return self._skip(shape, SPENT)
        for scheme in self.sweep.schemes:
            if reason := unfit(scheme, shape):
                self._skip(shape, reason)
        fitting = [each for each in present if each.scheme in ("float32", "bf16") or not unfit(each.scheme, shape)]
        needed, free = self._memory(shape, fitting), self.platform.free_memory()
        if needed > MEMORY_SHARE * free:
            return self._skip(shape, f"it takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
        self.note(f"{shape}: building {len(fitting)} contenders")
        held = {kind: weights.make(kind, shape, self.platform.device) for kind in dict.fromkeys(c.kind for c in fitting)}
        entrants = [built for each in fitting if (built := self._build(shape, each, held[each.kind]))]
        for m in self.sweep.rows:
            if self._late():
                self._skip(f"{shape} M={m}", SPENT)
                continue
            try:
                self._cell(shape, m, entrants, held)
            except Exception as error:  # as above
                self._skip(f"{shape} M={m}", failure(error))
            after(self.result)
        return None

    def _copies(self, each: Contender, shape: Shape) -> int:
        return self.platform.copies(limits.weight_bytes(each.scheme, shape.n, shape.k)) if each.rotates else 1

    def _memory(self, shape: Shape, present: list[Contender]) -> float:
        """Bytes of all copies, of the weights that they are made from, and of what the largest call has besides."""
        count, m = shape.n * shape.k, max(self.sweep.rows)
        kinds = {each.kind for each in present}
        copies = sum(each.holds * self._copies(each, shape) for each in present)
        return count * (copies + 4 * ("dense" in kinds) + len(kinds) + 8) + 12.0 * m * (shape.n + shape.k)

    def _build(self, shape: Shape, each: Contender, source: Weights) -> Entrant | None:
        try:
            with torch.no_grad():
                binds = [each.build(source.copy() if at else source) for at in range(self._copies(each, shape))]
        except Exception as error:  # one contender's fault must not cost the others their measurement
            self._skip(f"{each.name} at {shape}", failure(error))
            return None
        return Entrant(each, source, binds)

    def _cell(self, shape: Shape, m: int, entrants: list[Entrant], held: dict[str, Weights]) -> None:
        generator = torch.Generator(self.platform.device).manual_seed(m)
        x = torch.randn(m, shape.k, generator=generator, device=self.platform.device).bfloat16()
        references: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            more = self.tuner.entrants(shape, m, x, held) if self.tuner else []
            made = [(self._row(each, shape, m), each) for each in [*entrants, *more]]
            prepared: dict[str, Any] = {}
            for row, each in made:
                if each.weights.format not in references:
                    references[each.weights.format] = each.weights.reference(x)
                calls = self._checked(row, each, x, references[each.weights.format])
                if calls is not None:
                    prepared[row.contender] = calls
            references.clear()
            self.note(f"{shape} M={m}: timing {len(prepared)} contenders over {self.sweep.rounds} rounds")
            race = self.platform.clock.race(prepared, self.sweep.rounds)
        self.result.telemetry += [asdict(each) | {"n": shape.n, "k": shape.k, "m": m} for each in race.telemetry]
        rows = [row for row, _ in made]
        for row, each in made:
            if row.contender in race.rounds:
                self._timed(row, each.contender, race.rounds[row.contender], race.discarded)
        add_speedups(rows)
        self.result.rows += rows

    def _row(self, each: Entrant, shape: Shape, m: int) -> Row:
        c = each.contender
        return Row(
            shape.name, shape.n, shape.k, m, regime(m), c.scheme, c.name, c.ours, c.baseline,
            form=c.form(each.binds[0]), copies=len(each.binds),
        )  # fmt: skip

    def _checked(self, row: Row, each: Entrant, x: Tensor, reference: tuple[Tensor, Tensor]) -> Any:
        """What the clock made of its calls, if its result is right; else None, and the row says what is wrong."""
        own = x.to(each.contender.dtype)
        try:
            calls = [bind(own) for bind in each.binds]
            reason, row.error = fault(each.contender, calls[0](), (row.m, row.n), *reference)
            if reason is None:
                return self.platform.clock.prepare(calls)
            row.state, row.reason = "wrong", reason
        except Exception as error:  # as in _build: many find out at their first call that they cannot
            row.state, row.reason = "failed", failure(error)
        self.note(f"{row.contender} at {row.n} x {row.k}, M={row.m}: {row.state}, {row.reason}")
        return None

    def _timed(self, row: Row, each: Contender, rounds: list[float], discarded: str | None) -> None:
        row.rounds = [round(spent, 3) for spent in rounds]
        if discarded:  # what was measured is kept, and counts nowhere
            row.state, row.reason = "discarded", discarded
            return
        size = (row.scheme, row.n, row.k, row.m, *each.sizes)
        row.us, row.p20, row.p80 = median(rounds), percentile(rounds, 0.2), percentile(rounds, 0.8)
        row.gbps = limits.moved_bytes(*size) / row.us / 1e3
        row.tflops = limits.operations(row.n, row.k, row.m) / row.us / 1e6
        for name, peaks in self.peaks.items():
            row.limit_us[name] = limits.limit_us(peaks, *size) if peaks else None
            row.fraction[name] = row.limit_us[name] / row.us if row.limit_us[name] else None


def add_speedups(rows: list[Row]) -> None:
    """To the rows of one race, over the fastest of its dense bfloat16 baselines, round by round."""
    baselines = [row for row in rows if row.baseline and row.us]
    if not baselines:
        return
    fastest = min(baselines, key=lambda row: row.us)
    for row in rows:
        if row.us:
            row.speedup = median(theirs / ours for theirs, ours in zip(fastest.rounds, row.rounds, strict=True))


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"
