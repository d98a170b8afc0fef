"""The results of `benchmarks.removal` as a picture: speed-up against the share of FLOPs left, one panel for each size.

Both axes are logarithmic, so that the ideal (half of the work, half of the time) is a straight line. The picture has its own
background and follows a reader's preference for dark, so that it can be read on any page.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 250, 200
# Around each panel's axes, and above all of them.
LEFT, RIGHT, TOP, BOTTOM, HEAD = 46, 18, 34, 44, 64
LEGEND = 880
"""What the legend needs across, of six forms and the ideal."""
COLORS = {"dense": "c1", "int8": "c2", "masked": "c3"}
TICKS_LEFT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TICKS_SPEED = (0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-weight: 600; } .small { font-size: 11px; fill: #59636e; } .page { fill: #ffffff; }
.grid { stroke: #d1d9e0; stroke-width: 1; } .ideal { stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 2 3; fill: none; }
.line { fill: none; stroke-width: 2; } .eager { stroke-dasharray: 6 4; } .spread { stroke-width: 1; opacity: 0.6; }
.c1 { stroke: #0969da; } .c2 { stroke: #bc4c00; } .c3 { stroke: #818b98; }
.dot.c1 { fill: #0969da; } .dot.c2 { fill: #bc4c00; } .dot.c3 { fill: #818b98; }
.dot.eager { fill: #ffffff; stroke-dasharray: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; } .page { fill: #0d1117; } .grid { stroke: #3d444d; }
  .ideal { stroke: #9198a1; }
  .c1 { stroke: #58a6ff; } .c2 { stroke: #f0883e; } .c3 { stroke: #848d97; }
  .dot.c1 { fill: #58a6ff; } .dot.c2 { fill: #f0883e; } .dot.c3 { fill: #848d97; } .dot.eager { fill: #0d1117; }
}
"""


def svg(models: list[dict]) -> str:
    """models: results as `benchmarks.removal.measure` gives them; a row of panels for each."""
    columns = max(len(result["sizes"]) for result in models)
    wide, high = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    width, height = max(columns * wide + 8, LEGEND), HEAD + len(models) * high
    least, fastest, slowest = _ranges(models)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        "<title>Speed-up by removing heads and FFN channels, against the share of FLOPs left</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        *_legend(models[0]["backends"]),
    ]
    for i, result in enumerate(models):
        for j, size in enumerate(result["sizes"]):
            panel = _Panel(j * wide + LEFT, HEAD + i * high + TOP, least, slowest, fastest)
            parts += panel.drawn(result, size)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ranges(models: list[dict]) -> tuple[float, float, float]:
    """The smallest share of FLOPs that is left, the largest and the smallest speed-up, with some room."""
    tables = [result["rows"] for result in models]
    shares = [row["flops"][s] / rows[0]["flops"][s] for rows in tables for row in rows for s in row["flops"]]
    speeds = [
        time["speedup"]
        for result in models
        for row in result["rows"]
        for form in row["forms"].values()
        for times in form["times"].values()
        for time in times.values()
    ]
    least = min(shares)
    return least / 1.04, max(1.02 / least, *speeds) * 1.03, min(0.95, *speeds) / 1.03


class _Panel:
    """One pair of axes with its upper left corner at (left, top)."""

    def __init__(self, left: float, top: float, least: float, slowest: float, fastest: float):
        self.left, self.top, self.least, self.slowest, self.fastest = left, top, least, slowest, fastest

    def x(self, share: float) -> float:
        """All of the work is at the left, what is least at the right."""
        return round(self.left + WIDTH * math.log(share * 0.98) / math.log(self.least * 0.98), 1)

    def y(self, speed: float) -> float:
        """A spread may reach out of the panel, which the medians span; it is cut there."""
        speed = min(max(speed, self.slowest), self.fastest)
        place = math.log(speed / self.slowest) / math.log(self.fastest / self.slowest)
        return round(self.top + HEIGHT * (1 - place), 1)

    def drawn(self, result: dict, size: str) -> list[str]:
        parts = [_text(self.left, self.top - 12, f"{result['title']}, {result['sizes'][size]}", "title")]
        right, bottom = self.left + WIDTH, self.top + HEIGHT
        for speed in (s for s in TICKS_SPEED if self.slowest <= s <= self.fastest):
            y = self.y(speed)
            parts.append(f'<line class="grid" x1="{self.left}" y1="{y}" x2="{right}" y2="{y}"/>')
            parts.append(_text(self.left - 6, y + 4, f"{speed:g}x", "small", "end"))
        for share in (s for s in TICKS_LEFT if s >= self.least):
            parts.append(_text(self.x(share), bottom + 16, f"{share:.0%}", "small", "middle"))
        parts.append(_text(self.left + WIDTH / 2, bottom + 33, "FLOPs left", "small", "middle"))
        ends = (1.0, max(self.least, 1 / self.fastest))
        path = " ".join(f"{self.x(share)},{self.y(1 / share)}" for share in ends)
        parts.append(f'<polyline class="ideal" points="{path}"/>')
        for form in reversed(COLORS):
            for backend in result["backends"]:
                parts += self._line(result, size, form, backend)
        return parts

    def _line(self, result: dict, size: str, form: str, backend: str) -> list[str]:
        whole = result["rows"][0]["flops"][size]
        points = []
        for row in result["rows"]:
            # Zeros are multiplied like other numbers, and still the masked form stands where it could be.
            share = row["flops"][size] / whole
            if form in row["forms"]:
                points.append((self.x(share), row["forms"][form]["times"][backend][size]))
        if not points:
            return []
        look = f"{COLORS[form]} {backend}"
        path = " ".join(f"{x},{self.y(time['speedup'])}" for x, time in points)
        parts = [f'<polyline class="line {look}" points="{path}"/>']
        for x, time in points:
            low, high = self.y(time["speedup_low"]), self.y(time["speedup_high"])
            parts.append(f'<line class="spread {COLORS[form]}" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
            parts.append(f'<circle class="dot {look}" cx="{x}" cy="{self.y(time["speedup"])}" r="3.2" stroke-width="1.6"/>')
        return parts


def _legend(backends: list[str]) -> list[str]:
    parts = [_text(LEFT, 24, "Times faster than with nothing pruned", "title")]
    entries = [(f"{COLORS[form]} {backend}", f"{form}, {backend}") for form in COLORS for backend in backends]
    x = LEFT
    for look, words in [("ideal", "ideal"), *entries]:
        line = "ideal" if look == "ideal" else f"line {look}"
        parts.append(f'<line class="{line}" x1="{x}" y1="46" x2="{x + 26}" y2="46"/>')
        if look != "ideal":
            parts.append(f'<circle class="dot {look}" cx="{x + 13}" cy="46" r="3.2" stroke-width="1.6"/>')
        parts.append(_text(x + 32, 50, words, "small"))
        x += 44 + 6.2 * len(words)
    return parts


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
