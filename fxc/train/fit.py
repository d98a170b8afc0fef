"""What training did, as a record."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """seconds: since the beginning, with those of an earlier process that was killed; loss: the mean over the steps since the
    last point, None where none was taken; held_out: the loss on held-out samples."""

    step: int
    seconds: float
    loss: float | None
    held_out: float


@dataclass
class Fit:
    """before, after: the loss on held-out samples, equal where no state was better than the first; steps: those that were
    taken, without `skipped` ones, whose gradient was not finite; precision: what products ran in; stopped: why training ended
    before its time."""

    before: float
    after: float
    steps: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    skipped: int = 0
    precision: str = "float32"
    stopped: str | None = None
