"""How what takes long shows how far it has come, without knowing to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""(items, what is done with them, how many there are at most) -> the items, shown to somebody as they are taken."""

Say = Callable[[str], None]
"""Tells somebody, before it begins, what is going to be done."""


def unsaid(text: str) -> None:
    pass


def untracked(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    return items
