"""One row of the table, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class Row:
    """work: what was done; bar: what was to be reached; before: the model, without: compressed and not trained, after: trained,
    each in the measure that the bar is in; seconds: of compressing and training; how: as it was asked for."""

    work: str
    bar: str
    before: float
    without: float
    after: float
    seconds: float
    how: str


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    began = time.perf_counter()
    made = make()
    return made, time.perf_counter() - began
