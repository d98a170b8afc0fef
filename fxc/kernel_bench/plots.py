"""Two pictures of a run: where each product stands under its roofline, and how much faster than dense bfloat16 it is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fxc.kernel_bench import limits
from fxc.kernel_bench.run import Result, Row

MISSING = "no pictures: matplotlib is not installed (pip install matplotlib)"
_COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#57606a", "#cf222e", "#0550ae")


def draw(stem: Path, result: Result, peaks: Sequence[Any]) -> tuple[list[Path], str | None]:
    """stem-roofline.png and stem-speedup.png: (what was drawn, why nothing was or None)."""
    if util.find_spec("matplotlib") is None:
        return [], MISSING
    ours = best_of_ours(result.rows)
    if not ours:
        return [], "no pictures: nothing was timed"
    paths = [stem.with_name(f"{stem.name}-{name}.png") for name in ("roofline", "speedup")]
    _roofline(paths[0], ours, [each for each in peaks if each])
    _speedup(paths[1], ours, best_of_others(result.rows))
    return paths, None


def best_of_ours(rows: Sequence[Row]) -> list[Row]:
    return _best([row for row in rows if row.ours and row.us and "kernel only" not in row.contender])


def best_of_others(rows: Sequence[Row]) -> list[Row]:
    """Of everything else that computes a scheme with what it needs."""
    return _best([row for row in rows if not row.ours and row.us and "kernel only" not in row.contender])


def _best(rows: list[Row]) -> list[Row]:
    """Of each scheme and size, the fastest."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = (row.scheme, row.n, row.k, row.m)
        if key not in found or row.us < found[key].us:
            found[key] = row
    return list(found.values())


def _axes(title: str, x: str, y: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(True, which="major", color="#d1d9e0", linewidth=0.6)
    return figure, axes


def _colors(rows: list[Row]) -> dict[str, str]:
    return {scheme: _COLORS[at % len(_COLORS)] for at, scheme in enumerate(dict.fromkeys(row.scheme for row in rows))}


def _roofline(path: Path, rows: list[Row], peaks: list[Any]) -> None:
    figure, axes = _axes("fxc under the roofline", "operations for each byte moved", "TFLOP/s")
    intensities = [limits.operations(row.n, row.k, row.m) / _moved(row) for row in rows]
    span = [min(intensities) / 2, max(intensities) * 2]
    grid = [span[0] * (span[1] / span[0]) ** (at / 200) for at in range(201)]
    for each, style in zip(peaks, ("-", "--") if len(peaks) > 1 else ("--",)):
        for kind, width in (("bf16", 1.0), ("int8", 1.6)):
            if rate := getattr(each, kind):
                roof = [min(at * each.bandwidth, rate) / 1e12 for at in grid]
                axes.plot(grid, roof, style, color="#59636e", linewidth=width, label=f"{kind}, {each.source}")
    for scheme, color in _colors(rows).items():
        mine = [(at, row.tflops) for at, row in zip(intensities, rows) if row.scheme == scheme]
        axes.scatter(*zip(*mine), s=16, color=color, label=scheme, zorder=3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path)


def _moved(row: Row) -> float:
    return row.gbps * row.us * 1e3


def _speedup(path: Path, ours: list[Row], others: list[Row]) -> None:
    title = "Times faster than dense bfloat16, geometric mean over weights\nfxc (lines) and the fastest rival (dots)"
    figure, axes = _axes(title, "rows (tokens)", "times faster")
    axes.axhline(1.0, color="#59636e", linewidth=1)
    for scheme, color in _colors(ours).items():
        axes.plot(*_means(ours, scheme), "-o", color=color, markersize=3, label=scheme)
        axes.plot(*_means(others, scheme), ":x", color=color, markersize=5)
    ms = sorted({row.m for row in ours})
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path)


def _means(rows: list[Row], scheme: str) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.scheme == scheme and row.speedup:
            found.setdefault(row.m, []).append(row.speedup)
    ms = sorted(found)
    return ms, [geometric_mean(found[m]) for m in ms]
