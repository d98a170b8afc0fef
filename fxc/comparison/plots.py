"""Two pictures of a comparison: quality against size, and against latency, with the front of what nothing beats."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from io import BytesIO
from typing import Any

from fxc.comparison.result import Comparison, Row, latency_of
from fxc.errors import printable

MISSING = "no pictures: matplotlib is not installed (pip install matplotlib)"
_LINE, _POINT, _FRONT = "#59636e", "#0969da", "#bc4c00"
_LABELS = {
    "perplexity": "perplexity (less is better)", "accuracy": "accuracy", "cosine": "cosine with the original",
    "kl": "KL from the original, nats a token (less is better)",
}  # fmt: skip


def pictures(comparison: Comparison) -> dict[str, bytes] | None:
    """Name of a file -> SVG; None without matplotlib."""
    if util.find_spec("matplotlib") is None:
        return None
    by_size = [("on disk, MB", lambda row: row.measured.disk_bytes / 1e6, comparison.by_size())]
    by_latency = [
        (f"{each[1]} {each[0]}, ms", lambda row, column=each: latency_of(row, column).median, comparison.by_latency(each))
        for each in comparison.columns
    ]
    return {"quality_by_size.svg": _drawn(comparison, by_size), "quality_by_latency.svg": _drawn(comparison, by_latency)}


def _drawn(comparison: Comparison, panels: list[tuple[str, Callable[[Row], float], list[Row]]]) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Text stays text, and the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxc"}):
        rows = comparison.measured
        figure = Figure(figsize=(8, 4.5 * len(panels) + 0.16 * len(rows) + 0.4), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(_text(comparison.model))
        for axes, (label, cost, front) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _panel(axes, rows, label, cost, front)
        # Names are long, and points may lie on each other: a point has a number, and the names stand below.
        names = [Line2D([], [], linestyle="none", label=_text(f"{at}  {row.strategy}")) for at, row in enumerate(rows, 1)]
        figure.legend(handles=names, loc="outside lower left", fontsize=8, handlelength=0, handletextpad=0, frameon=False)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(axes: Any, rows: list[Row], label: str, cost: Callable[[Row], float], front: list[Row]) -> None:
    kind = rows[0].measured.quality.kind
    axes.set(xlabel=label, ylabel=_LABELS[kind])
    axes.grid(True, color="#d1d9e0", linewidth=0.6)
    values = [row.measured.quality.value for row in rows]
    if kind == "perplexity" and max(values) > 4 * min(values):
        axes.set_yscale("log")
    axes.plot([cost(row) for row in front], [row.measured.quality.value for row in front], "-", color=_FRONT, linewidth=1.2)
    for row, value in zip(rows, values, strict=True):
        color = _FRONT if row in front else _POINT
        spread = _spread(row, values[0])
        axes.errorbar(cost(row), value, yerr=spread, fmt="o", markersize=4, color=color, ecolor=_LINE, capsize=2)
    axes.margins(x=0.1, y=0.12)
    for at, (x, y) in _groups([(cost(row), value) for row, value in zip(rows, values, strict=True)]):
        numbers = ", ".join(str(each + 1) for each in at)
        axes.annotate(numbers, (x, y), (5, 4), textcoords="offset points", fontsize=8)


def _groups(points: list[tuple[float, float]]) -> list[tuple[list[int], tuple[float, float]]]:
    """Points that lie so near to each other that they have one label: which, and where the first of them is."""
    wide, high = (max(each) - min(each) or 1.0 for each in zip(*points))
    found: list[tuple[list[int], tuple[float, float]]] = []
    for at, (x, y) in enumerate(points):
        near = next((g for g in found if abs(g[1][0] - x) < 0.03 * wide and abs(g[1][1] - y) < 0.04 * high), None)
        near[0].append(at) if near else found.append(([at], (x, y)))
    return found


def _spread(row: Row, first: float) -> float | None:
    """The standard error of the difference to the first row, in units of the value."""
    error = row.loss[1]
    return error if error is None or row.measured.quality.kind != "perplexity" else error * first


def _text(name: str) -> str:
    """A name as it is: between dollars matplotlib would read mathematics."""
    cleaned = printable(name)
    return (cleaned if len(cleaned) <= 90 else f"{cleaned[:87]}...").replace("\\", "/").replace("$", r"\$")
