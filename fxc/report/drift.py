"""A plot of a history of measurements: how much worse than its original an artifact was, over time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib import util
from pathlib import Path
from typing import Any

from fxc.artifact.staging import resource_error

MISSING = "no plot of the history: matplotlib is not installed (pip install matplotlib)"


def is_there() -> bool:
    return util.find_spec("matplotlib") is not None


def draw(entries: Sequence[dict[str, Any]], path: Path, limit: float | None) -> None:
    """A line for each measure (perplexity, accuracy, relative error) that the history has, and the limit. The suffix of `path`
    says in which form. Raises `ResourceError` where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for measure in dict.fromkeys(each["measure"] for each in entries):
        mine = [each for each in entries if each["measure"] == measure]
        times = [datetime.fromisoformat(each["time"]) for each in mine]
        # A measure comes from a file that others may have written, and matplotlib reads mathematics between dollars.
        axes.plot(times, [100 * each["worse"] for each in mine], "-o", markersize=4, label=measure[:40].replace("$", r"\$"))
    if limit is not None:
        axes.axhline(100 * limit, color="#cf222e", linewidth=1, linestyle="--", label="limit")
    axes.set_ylabel("worse than the original, %")
    axes.legend(frameon=False)
    axes.grid(True, color="#d1d9e0", linewidth=0.6)
    figure.autofmt_xdate()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise resource_error(error, path) from error
