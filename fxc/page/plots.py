"""The plots of a page, as SVG that stands in it: drawn by matplotlib in the page's colours, without a date."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import util
from typing import Any

from fxc.page import told
from fxc.page.layers import Row
from fxc.units import size

MISSING = "there are no plots: matplotlib was not installed where this page was written (pip install matplotlib)"
# What matplotlib draws in -> what the style sheet calls it.
_COLORS = {"#010101": "ink", "#020202": "grid", "#030303": "before", "#040404": "after", "#050505": "bad"}
_INK, _GRID, _BEFORE, _AFTER, _BAD = _COLORS
_OUTPUTS = re.compile(r"outputs differ by ([0-9.]+(?:e[+-]?[0-9]+)?)")
_MOST_KINDS = 12
_ROOF = (
    "products of layers under the roofline of the machine that measured them: the line is its memory and the fastest of "
    "torch's own products there; above it a kernel was faster than those, or the machine was busy while they were measured"
)


def is_there() -> bool:
    return util.find_spec("matplotlib") is not None


def plots_of(report: Mapping[str, Any], rows: Sequence[Row], roofline: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(what is shown, SVG) of each plot for which there is something to show."""
    made = [
        ("bytes by part, before and after", _bytes(rows)),
        ("relative error of single layers, in the order of the program", _errors(rows)),
        _quality(report),
        *_training(report),
        (_ROOF, _roofline(roofline)),
    ]
    return [(title, svg) for title, svg in made if svg is not None]


def _bytes(rows: Sequence[Row]) -> str | None:
    sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for row in rows:
        for side, each in zip(sides, (row.before, row.after)):
            if each and each["bytes"] is not None:
                side[each["kind"]] = side.get(each["kind"], 0) + each["bytes"]
    names = sorted({*sides[0], *sides[1]}, key=lambda name: (-max(side.get(name, 0) for side in sides), name))[:_MOST_KINDS]
    if not names:
        return None
    with _axes("bytes", 1.0 + 0.42 * len(names)) as (axes, figure):
        shown = [side for side in zip(sides, ("before", "after"), (_BEFORE, _AFTER), (-0.2, 0.2)) if side[0]]
        for side, label, color, off in shown:
            values = [side.get(name, 0) for name in names]
            places = [at + off for at in range(len(names))]
            axes.barh(places, values, 0.38, color=color, label=label)
            for at, value in zip(places, values):
                if value:
                    axes.annotate(f" {size(value)}", (value, at), va="center", fontsize=7, color=_INK)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.xaxis.set_major_formatter(lambda value, _: size(value))
        axes.legend(frameon=False, labelcolor=_INK)
        return _svg(figure, "bytes")


def _errors(rows: Sequence[Row]) -> str | None:
    points = [(at, row.error) for at, row in enumerate(row for row in rows if row.error is not None) if row.error > 0]
    if not points:
        return None
    with _axes("layers", 3.0) as (axes, figure):
        axes.set_yscale("log")
        low = min(error for _, error in points) / 2
        axes.vlines([at for at, _ in points], low, [error for _, error in points], color=_AFTER, linewidth=1.5)
        axes.set_ylim(bottom=low)
        worst = sorted((row for row in rows if row.error), key=lambda row: -row.error)[:1]
        place = {row.name: at for at, row in enumerate(row for row in rows if row.error is not None)}
        for row in worst:
            axes.annotate(row.name[-60:], (place[row.name], row.error), fontsize=7, color=_INK,
                          ha="right" if place[row.name] > len(place) / 2 else "left")  # fmt: skip
        axes.set_ylabel("relative error")
        _plain_ticks(axes.yaxis)
        return _svg(figure, "errors")


def _quality(report: Mapping[str, Any]) -> tuple[str, str | None]:
    """Perplexity after each pass where it was measured; else by how much each policy changed the outputs."""
    scored = [(told.text(each.get("name"), 40), told.number(each.get("perplexity"))) for each in
              told.mappings(report.get("quality"))]  # fmt: skip
    what, label = "perplexity after each pass", "perplexity"
    points = [(name, value) for name, value in scored if value is not None]
    if not points:
        what, label = "change of the outputs by each pass, relative", "relative error"
        for step in told.mappings(report.get("passes")):
            found = _OUTPUTS.search(told.text(told.mapping(step.get("gates")).get("meaning"), 300))
            if found:
                points.append((told.text(step.get("name"), 40), float(found[1])))
    if len(points) < 2:
        return what, None
    with _axes("", 2.6) as (axes, figure):
        axes.plot(range(len(points)), [value for _, value in points], "-o", color=_AFTER, markersize=4)
        axes.set_xticks(range(len(points)), [name for name, _ in points], rotation=20, ha="right")
        axes.set_ylabel(label)
        axes.margins(0.08, 0.15)
        return what, _svg(figure, "quality")


def _training(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for place, step in enumerate(told.mappings(report.get("passes"))):
        fit = told.mapping(step.get("training"))
        curve = [(told.number(p.get("step")), told.number(p.get("held_out"))) for p in told.mappings(fit.get("curve"))]
        points = [(0, told.number(fit.get("before"))), *curve]
        points = [(at, loss) for at, loss in points if at is not None and loss is not None]
        if len(points) < 2:
            continue
        with _axes("steps", 2.6) as (axes, figure):
            axes.plot(*zip(*points), "-o", color=_AFTER, markersize=3)
            axes.set_ylabel("loss")
            yield f"loss on held-out samples while {told.text(step.get('name'), 60)} trained", _svg(figure, f"training{place}")


def _roofline(measured: Mapping[str, Any] | None) -> str | None:
    """measured: what `fxc.measure.layers.Measured.roofline` gives."""
    if not measured or not measured["points"]:
        return None
    points, bandwidth, peak = measured["points"], measured["bandwidth"], measured["operations"]
    with _axes("operations for each byte", 3.2) as (axes, figure):
        axes.set(xscale="log", yscale="log")
        intensities = [x for x, _ in points]
        span = min(intensities) / 3, max(*intensities, peak / bandwidth) * 3
        grid = [span[0] * (span[1] / span[0]) ** (at / 60) for at in range(61)]
        axes.plot(grid, [min(at * bandwidth, peak) / 1e9 for at in grid], color=_INK, linewidth=1)
        axes.plot(intensities, [y / 1e9 for _, y in points], "o", color=_AFTER, markersize=4)
        axes.set_ylabel("GFLOP/s")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        return _svg(figure, "roofline")


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... and no powers of ten, which would be mathematics."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _axes(x: str, height: float) -> Iterator[tuple[Any, Any]]:
    """Axes in matplotlib's own style, whatever the user's is; names are no mathematics."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "fxc", "text.parse_math": False, "font.size": 8, "text.color": _INK,
            "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID,
        })  # fmt: skip
        figure = Figure(figsize=(7, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.grid(True, which="major", linewidth=0.5)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        yield axes, figure


_TAGS = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", re.S)
_SPACES = re.compile(r"\s*\n\s*")


def _svg(figure: Any, name: str) -> str:
    """The drawing alone, of the width that there is; ids are its own in the page. name: of the plot, letters and digits."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight",
                   metadata={"Date": None, "Creator": None, "Format": None, "Type": None})  # fmt: skip
    # A text between tags is escaped by matplotlib, so that none of these is one that a name brought.
    svg = _SPACES.sub("\n", _TAGS.sub("", file.getvalue())).strip()
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", svg, count=1)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
