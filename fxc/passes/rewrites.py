"""Rewrites are numbered over all passes, so that a run can be cut off after the first so many.

A rewrite is what a pass changes at once: a layer, a batch norm or a node where it goes through them one by one and asks
before each (`Rewrites.may`), and else all that the pass does. What comes first is the same whatever the limit, so that the
program of n rewrites and that of n + 1 differ by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

Each = TypeVar("Each")


@dataclass(frozen=True)
class Rewrite:
    """by: the pass, as it is written; place: the layer or node; "" where it was all that the pass did."""

    by: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.by}, {self.place}" if self.place else f"{self.by}, as a whole"


@dataclass
class Rewrites:
    """limit: how many there may be, any number where it is None; made: those so far, in order."""

    limit: int | None = None
    made: list[Rewrite] = field(default_factory=list)
    _by: str = ""
    _start: int = 0
    _is_asked: bool = False

    @property
    def is_over(self) -> bool:
        """Whether there may be no more."""
        return self.limit is not None and len(self.made) >= self.limit

    def may(self, place: str) -> bool:
        """Number the next rewrite, and say whether it is within the limit."""
        self._is_asked = True
        if self.is_over:
            return False
        self.made.append(Rewrite(self._by, place))
        return True

    def first(self, items: Iterable[Each], key: Callable[[Each], str], place: Callable[[Each], str]) -> list[Each]:
        """Those of `items` that are within the limit; what has the same key, a weight, is one rewrite."""
        allowed: dict[str, bool] = {}
        kept = []
        for item in items:
            if (name := key(item)) not in allowed:
                allowed[name] = self.may(place(item))
            if allowed[name]:
                kept.append(item)
        return kept

    def begin(self, by: str) -> None:
        self._by, self._start, self._is_asked = by, len(self.made), False

    def end(self, changed: int) -> None:
        """A pass that did not ask made one rewrite, if it changed anything."""
        if not self._is_asked and changed:
            self.made.append(Rewrite(self._by))

    def again(self) -> Rewrites:
        """For the same pass once more on the same program: it is cut off at the same place."""
        return Rewrites(None if self.limit is None else self.limit - self._start, _by=self._by)
