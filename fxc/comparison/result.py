"""What a comparison found: rows, which of them nothing beats, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxc.measure.contenders import Latency, Measured

_LONGEST = 160


@dataclass(frozen=True)
class Row:
    """One strategy. folder: the name of its artifact's folder; measured: its numbers, None where there are none, and then
    why_not is the error for that, as JSON (`FxcError.as_json`); loss: how much worse than the first row, with its standard
    error (`Quality.loss_against`); seconds: what making it took; reused: whether an earlier run had made it; runs_as: forms of
    its layers -> how many."""

    strategy: str
    passes: list[str]
    folder: str | None = None
    measured: Measured | None = None
    loss: tuple[float, float | None] | None = None
    why_not: dict[str, Any] | None = None
    seconds: float | None = None
    reused: bool = False
    runs_as: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "strategy": self.strategy, "passes": self.passes, "why_not": self.why_not, "reused": self.reused,
        }  # fmt: skip
        if self.measured is not None:
            loss, error = self.loss or (None, None)
            content |= {
                "folder": self.folder, "how": self.measured.how,
                "disk_bytes": self.measured.disk_bytes, "held_bytes": self.measured.held_bytes,
                "latencies": [each.as_json() for each in self.measured.latencies],
                "quality": self.measured.quality.as_json(), "loss": loss, "loss_standard_error": error,
                "seconds": self.seconds, "runs_as": self.runs_as,
            }  # fmt: skip
        return content


@dataclass(frozen=True)
class Comparison:
    """rows: the first is what the others are compared with. data: what quality was measured on, in words; found: whether it was
    found beside the model and not given; conditions: machine, versions, threads and what else the numbers depend on, as JSON;
    notes: what else a reader should know."""

    model: str
    data: str
    found: bool
    conditions: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.measured is not None]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The sizes and phases that were timed."""
        return [(each.size, each.phase) for each in self.measured[0].measured.latencies]

    def by_size(self) -> list[Row]:
        """The rows that no other is at once smaller on disk and better than, the smallest first."""
        return front(self.measured, lambda row: row.measured.disk_bytes)

    def by_latency(self, column: tuple[str, str]) -> list[Row]:
        """The rows that no other is at once faster and better than, the fastest first."""
        return front(self.measured, lambda row: latency_of(row, column).median)

    def as_json(self) -> dict[str, Any]:
        latency = [
            {"size": size, "phase": phase, "strategies": [row.strategy for row in self.by_latency((size, phase))]}
            for size, phase in self.columns
        ]
        return {
            "comparison": 1, "model": self.model, "data": self.data, "data_was_found": self.found, **self.conditions,
            "rows": [row.as_json() for row in self.rows],
            "pareto": {"size": [row.strategy for row in self.by_size()], "latency": latency}, "notes": self.notes,
        }  # fmt: skip


def reason(why_not: dict[str, Any]) -> str:
    """Why a strategy has no numbers, in a line: what is wrong, and the evidence, or else what to do."""
    said = f"{why_not['where']}: {why_not['what']}" if why_not.get("where") else str(why_not.get("what"))
    more = why_not.get("why") or why_not.get("hint")
    return f"{said}; {_cut(str(more))}" if more else said


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def latency_of(row: Row, column: tuple[str, str]) -> Latency:
    return next(each for each in row.measured.latencies if (each.size, each.phase) == column)


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """The rows that no other one beats: none costs less, or as much, and loses less. The cheapest first, the best last."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), row.loss[0])):
        if not kept or row.loss[0] < kept[-1].loss[0]:
            kept.append(row)
    return kept
