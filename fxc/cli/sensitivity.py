"""fxc sensitivity."""

from __future__ import annotations

from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

from fxc.captured import capture_source
from fxc.errors import UsageError
from fxc.measure.sensitivity import Effect, Sensitivity, sensitivity_of
from fxc.options import Options
from fxc.report.console import Output, size

_BAR = 30


def show_sensitivity(output: Output, model: str, options: dict[str, Any], chart: Path | None) -> None:
    if chart is not None and util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib draws the chart, and is not installed", where="-o", hint="pip install matplotlib")
    wanted = Options(**options)
    wanted.check()
    with output.doing(f"capturing {model}"):
        captured = capture_source(model, options=wanted)
    found = sensitivity_of(captured, wanted, output.track)
    largest = max((_size(each) for each in found.layers), default=0.0)
    rows = [(*_cells(each), "█" * round(_BAR * _size(each) / largest) if largest else "") for each in found.layers]
    loss = [] if found.before is None else [">loss, nats a token"]
    title = f"each layer alone, {found.passes}, over {found.samples} samples"
    output.table(title, ["layer", ">error", ">dB", *loss, ">bytes", ""], rows)
    together = found.together
    said = "" if together.loss is None else f"; loss {found.before:.4f} {together.loss:+.4f} nats a token"
    output.line(f"all at once: error {together.error:.3%}, {together.decibels:.1f} dB{said}")
    if chart is not None:
        draw(found, chart)
        output.line(f"wrote {chart}")
    output.json(asdict(found))


def _size(effect: Effect) -> float:
    """What the bar shows: by how much the loss rises, of a model without one the error."""
    return max(effect.error if effect.loss is None else effect.loss, 0.0)


def _cells(effect: Effect) -> list[str]:
    loss = [] if effect.loss is None else [f"{effect.loss:+.5f}"]
    before, after = size(effect.bytes_before), size(effect.bytes_after)
    return [effect.layer, f"{effect.error:.3%}", f"{effect.decibels:.1f}", *loss, f"{before} -> {after}"]


def draw(found: Sensitivity, path: Path) -> None:
    """A bar chart, the worst layer at the top; the suffix of `path` says in which form (.svg, .png, .pdf)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = found.layers[::-1]
    figure = Figure(figsize=(9, 1 + 0.22 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Names come from the model, and matplotlib would read mathematics between dollars.
    axes.barh([each.layer.replace("$", r"\$") for each in layers], [_size(each) for each in layers], color="#2a6f97")
    axes.set_xlabel("relative error of the output" if found.before is None else "rise of the loss, nats a token")
    axes.set_title(f"each layer alone: {found.passes}".replace("$", r"\$"), loc="left")
    axes.margins(y=0.01)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"no chart can be written as {path.suffix or 'a file without a suffix'}", where=path, why=str(error),
                         hint="name it .svg, .png or .pdf") from None  # fmt: skip
