"""Many cells in a few numbers: by regime, the geometric mean and the worst cell. Never only the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from fxc.kernel_bench.run import Row
from fxc.kernel_bench.shapes import REGIMES


@dataclass(frozen=True)
class Line:
    """One contender in one regime. speedup, fraction: geometric means over its cells, the speed-up over the dense bfloat16
    baseline of the same race, the fraction of the roofline by what is `peaks`; worst_*: the lowest, and where."""

    regime: str
    scheme: str
    contender: str
    ours: bool
    cells: int
    speedup: float | None
    worst_speedup: float | None
    worst_cell: str
    fraction: float | None
    worst_fraction: float | None
    peaks: str


def summarise(rows: Sequence[Row]) -> list[Line]:
    """In the order of regimes, then of rows. By datasheet peaks where there are such, else by measured ones."""
    timed = [row for row in rows if row.us is not None]
    peaks = "datasheet" if any(row.fraction.get("datasheet") for row in timed) else "measured"
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for name in REGIMES:
        for row in timed:
            if row.regime == name:
                groups.setdefault((name, row.scheme, row.contender), []).append(row)
    return [_line(key, group, peaks) for key, group in groups.items()]


def headlines(lines: Sequence[Line]) -> list[Line]:
    """Of each regime and scheme, the lines of fxc and that of the fastest rival."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.regime, line.scheme), []).append(line)
    found = []
    for group in groups.values():
        rivals = [line for line in group if not line.ours and line.speedup]
        fastest = max(rivals, key=lambda line: line.speedup, default=None)
        found += [line for line in group if line.ours or line is fastest]
    return found


def _line(key: tuple[str, str, str], group: list[Row], peaks: str) -> Line:
    speeds = [row for row in group if row.speedup]
    fractions = [row.fraction[peaks] for row in group if row.fraction.get(peaks)]
    worst = min(speeds, key=lambda row: row.speedup, default=None)
    return Line(
        *key,
        ours=group[0].ours,
        cells=len(group),
        speedup=geometric_mean(row.speedup for row in speeds) if speeds else None,
        worst_speedup=worst.speedup if worst else None,
        worst_cell=f"{worst.n} x {worst.k}, M={worst.m}" if worst else "",
        fraction=geometric_mean(fractions) if fractions else None,
        worst_fraction=min(fractions, default=None),
        peaks=peaks,
    )
