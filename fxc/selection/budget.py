"""Budgets: what the result may weigh, take and lose, and what is optimised within them.

    size=0.4x,latency=0.6x,quality=1%
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxc.errors import UsageError

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
_ITEM = re.compile(r"(size|latency|quality)\s*=\s*([0-9]*\.?[0-9]+)\s*(x|%|[kMG]?B)")
_KINDS = {"size": ("x", *_UNITS), "latency": ("x",), "quality": ("%",)}
_HINT = "as in size=0.4x,latency=0.6x,quality=1%, or size=4.1MB; any of the three"


@dataclass(frozen=True)
class Budget:
    """size: of what is on disk, a share of the original's bytes, or bytes where it is `in_bytes`; latency: a share of the
    original's, at every size and phase; quality: what may be lost, as `Quality.loss_against` counts it (0.01: perplexity may
    rise by 1 %, accuracy or the cosine fall by 0.01). None where there is no such budget."""

    size: float | None = None
    latency: float | None = None
    quality: float | None = None
    in_bytes: bool = False

    @property
    def optimised(self) -> str:
        """What the best result has least of: the first of quality (loss), size, latency that has no budget; loss where all
        have one."""
        return next((name for name in ("quality", "size", "latency") if getattr(self, name) is None), "quality")

    @property
    def is_timed(self) -> bool:
        """Whether latency counts."""
        return self.latency is not None or self.optimised == "latency"

    def most_bytes(self, original: int) -> float:
        """Of a model with so many bytes; infinite without a budget of size."""
        if self.size is None:
            return float("inf")
        return self.size if self.in_bytes else self.size * original

    def __str__(self) -> str:
        said = []
        if self.size is not None:
            said.append(f"size={self.size:.0f}B" if self.in_bytes else f"size={self.size:g}x")
        if self.latency is not None:
            said.append(f"latency={self.latency:g}x")
        if self.quality is not None:
            said.append(f"quality={100 * self.quality:g}%")
        return ",".join(said)


def parse_budget(text: str) -> Budget:
    """The budgets in `text`. Raises `UsageError` for another form, none at all, or one that is given twice or is zero."""
    given: dict[str, float | bool] = {}
    for item in text.split(","):
        found = _ITEM.fullmatch(item.strip())
        if found is None or found[3] not in _KINDS[found[1]]:
            raise UsageError(f"{item.strip()!r} is no budget", where="budget", hint=_HINT)
        name, number, unit = found[1], float(found[2]), found[3]
        if name in given:
            raise UsageError(f"{name} is given twice", where="budget", hint=_HINT)
        if number == 0 and name != "quality":
            raise UsageError(f"nothing has a {name} of zero", where="budget", hint=_HINT)
        given[name] = number / 100 if unit == "%" else round(number * _UNITS[unit]) if unit in _UNITS else number
        if unit in _UNITS:
            given["in_bytes"] = True
    return Budget(**given)
