"""A curve as a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxc.train.fit import Fit

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 5


def chart(points: Sequence[tuple[int, float]], height: int = _HEIGHT, column: int = 3) -> list[str]:
    """Of (step, value) a bar each, `column` characters wide and up to `height` lines high, between the least and the largest
    finite value, which stand before the lowest and the highest line; steps are under the first and the last. [] for fewer than
    two finite values."""
    finite = [value for _, value in points if math.isfinite(value)]
    if len(finite) < 2:
        return []
    low, high = min(finite), max(finite)
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    # The least has a bar too: an eighth of a line.
    unit = (8 * height - 1) / ((high - low) or 1)
    tall = [1 + round(unit * (value - low)) if math.isfinite(value) else 0 for _, value in points]
    lines = []
    for row in range(height):
        below = 8 * (height - 1 - row)
        bars = "".join(_EIGHTHS[min(max(each - below, 0), 8)] * (column - 1) + " " for each in tall)
        lines.append(f"{labels.get(row, ''):>{margin}} |{bars.rstrip()}")
    first, last = f"{points[0][0]:,}", f"{points[-1][0]:,}"
    width = column * len(points) - 1
    return [*lines, f"{'':>{margin}}  {first}{last:>{max(width - len(first), len(last) + 1)}} steps"]


def curve(fit: Fit) -> list[str]:
    """The loss on held-out samples while something was trained."""
    return chart([(0, fit.before), *((point.step, point.held_out) for point in fit.curve)])
