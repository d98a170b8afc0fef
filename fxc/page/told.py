"""What a report says, whoever wrote it: values of the kinds that they should be, or nothing.

An artifact may be of another version of fxc, or of a stranger. A page shows what it finds, and leaves out what is no number or
no text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fxc.errors import printable

LONGEST = 160


def text(value: Any, longest: int = LONGEST) -> str:
    """On one line, without what moves or hides text, and cut in the middle."""
    said = printable(value if isinstance(value, str) else "")
    return said if len(said) <= longest else f"{said[: longest // 2]}…{said[-(longest // 2) :]}"


def number(value: Any) -> float | None:
    """A finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    return value if is_number and math.isfinite(value) else None


def whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list | tuple) else []


def numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Name and number of each entry that has one."""
    for name, each in mapping(value).items():
        if (found := number(each)) is not None:
            yield name, found


def texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []
