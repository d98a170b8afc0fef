"""How what takes long shows how far it has come, without knowing to whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""(items, what is done with them, how many there are at most, None where nobody knows) -> the items, shown to somebody as they
are taken."""

Say = Callable[[str], None]
"""Tells somebody, before it begins, what is going to be done."""


def unsaid(text: str) -> None:
    pass


def untracked(items: Iterable[Any], what: str, count: int | None) -> Iterable[Any]:
    return items


class Pace:
    """How long what is left will take. weights: of each part, what share of the time it may take; first: the first that is done
    now, and not earlier by somebody else."""

    def __init__(self, weights: Sequence[float], first: int = 0) -> None:
        self._weights, self._first, self._began = weights, first, time.monotonic()

    def left(self, at: int) -> str | None:
        """Before part `at`, in words; None before the first."""
        done = sum(self._weights[self._first : at])
        if not done:
            return None
        return in_words((time.monotonic() - self._began) / done * sum(self._weights[at:]))


def in_words(seconds: float) -> str:
    """How long something still takes."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h left"
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{max(seconds, 0):.0f} s left"
