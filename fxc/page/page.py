"""The page as one file: nothing in it comes from elsewhere, and the same artifact gives the same bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fxc.ir.program import Program
from fxc.page import plots, told
from fxc.page.again import again
from fxc.page.graph import parts_of_graph
from fxc.page.layers import BOTH, GONE, NEW, PACKED, SAME, SMALLER, UNKNOWN, Row, rows_of
from fxc.schemes.parameters import parameters
from fxc.units import ratio, size

# Rows of the table, lines about what else was refused.
MOST_ROWS, MOST_OTHERS = 1000, 60
_PALETTE = 5
# What does not count as a change that somebody decided.
_TIDIES = ("canonicalize",)


def page(program: Program, manifest: Mapping[str, Any], measured: Any = None) -> bytes:
    """The HTML of `report.html`. program: its constants may be on meta; manifest: of its artifact, whoever wrote it; measured:
    what `fxc.measure.layers.measure` found on this machine, None where nobody measured."""
    report = told.mapping(manifest.get("report"))
    rows, others = rows_of(program, report, measured.microseconds if measured else {})
    steps = told.mappings(report.get("passes"))
    colors = _colors(steps)
    listed = _largest(rows)
    statuses = [status for status in (PACKED, BOTH, SMALLER, GONE, NEW, SAME, UNKNOWN) if any(r.status == status for r in rows)]
    drawn = plots.plots_of(report, rows, measured.roofline if measured else None) if plots.is_there() else []
    script, css = _source("report.js"), _source("report.css")
    from markupsafe import Markup

    html = _template().render(
        policy=_policy(script),
        title=told.text(program.metadata.get("class")) or "a model",
        versions={name: told.text(version) for name, version in told.mapping(manifest.get("versions")).items()},
        css=Markup(css),
        script=Markup(script),
        cards=_cards(program, manifest, report),
        lacking=_lacking(report, rows),
        passes=[_step(step, colors) for step in steps],
        plots=[(caption, Markup(svg)) for caption, svg in drawn],
        no_plots=None if plots.is_there() else plots.MISSING,
        statuses=statuses,
        heads=_heads(measured is not None),
        rows=[_row(row) for row in listed],
        rows_left=len(rows) - len(listed),
        timed=measured is not None,
        measured_how=measured.how if measured else None,
        others=others[:MOST_OTHERS],
        blocks=_blocks(program, rows, colors),
        again=again(report),
    )
    return html.encode()


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["shorten"] = told.text
    return environment.get_template("report.html.jinja")


def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Everything from elsewhere is forbidden, and any script but this one. Styles: those of the drawings are attributes."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def _colors(steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of each pass that decides its number among the colours."""
    names = dict.fromkeys(_short(step) for step in steps)
    return {name: at % _PALETTE for at, name in enumerate(name for name in names if name not in _TIDIES)}


def _short(step: Mapping[str, Any]) -> str:
    return told.text(step.get("name"), 80).partition(":")[0]


def _cards(program: Program, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    files = told.mapping(manifest.get("files"))
    sizes = [told.whole(told.mapping(entry).get("size")) or 0 for name, entry in files.items() if _is_the_model(name)]
    was, now = told.whole(report.get("bytes_before")), program.nbytes()
    numbers = parameters(program)
    cards = [
        ("weights", f"{size(was)} → {size(now)}" if was else size(now), ratio(now, was) if was else ""),
        ("on disk", size(sum(sizes)), "weights, program, configuration"),
    ]
    before = told.whole(report.get("parameters_before"))
    known = f"{before:,} → {numbers:,}" if before else f"{numbers:,}"
    cards.append(("parameters", known, ratio(numbers, before) if before else ""))
    if (coverage := told.number(report.get("coverage"))) is not None:
        cards.append(("coverage", f"{coverage:.1%}", "of the weight bytes were rewritten"))
    losses = told.mapping(report.get("perplexity"))
    a, b, change = (told.number(losses.get(name)) for name in ("before", "after", "change"))
    if a is not None and b is not None and change is not None:
        error = told.number(losses.get("standard_error"))
        cards.append(("perplexity", f"{a:.3f} → {b:.3f}", f"{change:+.2%}" + (f" ± {error:.2%}" if error is not None else "")))
    source = told.mapping(report.get("source"))
    if source:
        cards.append(("made from", told.text(source.get("id")) or "a module", told.text(source.get("kind"))))
    for key, name in (("calibration", "learned from"), ("training", "trained on")):
        data = told.mapping(report.get(key))
        if data and (count := told.whole(data.get("samples"))) is not None:
            cards.append((name, f"{count:,} samples", f"judged on {told.whole(data.get('held_out')) or 0} others"))
    return cards


def _is_the_model(name: str) -> bool:
    """As `fxc.analysis.sizes.on_disk` counts, without the manifest, which does not know its own size."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in ("program.fxc", "config.json")


def _lacking(report: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    found = []
    if not report.get("passes"):
        found.append("which passes ran")
    if rows and all(row.status == UNKNOWN for row in rows):
        found.append("what each layer was before")
    if not told.mapping(report.get("perplexity")):
        found.append("perplexity (--eval-text measures it)")
    if not any(row.errors for row in rows):
        found.append("errors of single layers")
    return found


def _step(step: Mapping[str, Any], colors: Mapping[str, int]) -> dict[str, Any]:
    changed = told.whole(step.get("changed"))
    counts = [told.whole(step.get(f"parameters_{side}")) for side in ("before", "after")]
    nbytes = [told.whole(step.get(f"bytes_{side}")) for side in ("before", "after")]
    gates = {name: outcome for name, outcome in told.mapping(step.get("gates")).items() if isinstance(outcome, str)}
    return {
        "name": told.text(step.get("name"), 4000),
        "short": _short(step),
        "color": colors.get(_short(step), ""),
        "changed": "" if changed is None else f"{changed:,}",
        "parameters": _change(counts, lambda count: f"{count:,}"),
        "bytes": _change(nbytes, size),
        "gates": f"{sum(each.startswith('ok') for each in gates.values())} of {len(gates)} ok" if gates else "not run",
        "meaning": told.text(gates.get("meaning"), 300),
        "notes": [told.text(note, 400) for note in told.texts(step.get("notes"))],
    }


def _change(sides: Sequence[Any], shown: Any) -> str:
    if None in sides:
        return ""
    return shown(sides[1]) if sides[0] == sides[1] else f"{shown(sides[0])} → {shown(sides[1])}"


def _largest(rows: Sequence[Row]) -> Sequence[Row]:
    if len(rows) <= MOST_ROWS:
        return rows
    heavy = sorted(rows, key=lambda row: -max(each.get("bytes") or 0 for each in (row.before, row.after)))[:MOST_ROWS]
    kept = {row.name for row in heavy}
    return [row for row in rows if row.name in kept]


def _heads(timed: bool) -> list[str]:
    heads = ["layer", "what became of it", "shape before", "after", "format", "bytes before", "after"]
    return [*heads, *(["µs"] if timed else []), "error", "who decided", "what was refused, and why"]


def _row(row: Row) -> dict[str, Any]:
    was, now = row.before, row.after
    refused = dict.fromkeys(f"{name.partition(':')[0]}: {why}" for name, why in row.refused)
    silent = row.status == SAME and not row.refused and not row.decided
    return {
        "name": row.name,
        "status": row.status,
        "before_shape": _shape(was),
        "after_shape": _shape(now),
        "format": _format(was, now),
        "before_bytes": _plain(was.get("bytes")),
        "before_size": "" if was.get("bytes") is None else size(was["bytes"]),
        "after_bytes": _plain(now.get("bytes")),
        "after_size": "" if now.get("bytes") is None else size(now["bytes"]),
        "us": "" if row.microseconds is None else f"{row.microseconds:.1f}",
        "error": _plain(row.error),
        "errors": "; ".join(f"{error:.2e}" + (f" ({name.partition(':')[0]})" if len(row.errors) > 1 else "")
                            for name, error in row.errors),
        "decided": "; ".join(f"{told.text(name, 60)}: {what}" for name, what in row.decided)
        or ("no pass of the recipe is for it" if silent else ""),
        "refused": told.text("; ".join(refused), 300),
    }  # fmt: skip


def _format(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The kinds before and after, where they are one its dtypes."""
    if not was or not now:
        return (now or was)["kind"]
    if was["kind"] != now["kind"]:
        return f"{was['kind']} → {now['kind']}"
    dtypes = list(dict.fromkeys((was["dtypes"], now["dtypes"])))
    return f"{now['kind']} ({' → '.join(dtypes)})"


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _shape(layer: Mapping[str, Any]) -> str:
    return " × ".join(map(str, layer.get("shape") or ()))


def _blocks(program: Program, rows: Sequence[Row], colors: Mapping[str, int]) -> list[dict[str, Any]]:
    shown = []
    for part in parts_of_graph(program, rows):
        lines = [{"text": line.text, "color": colors.get(line.by)} for line in part.lines]
        first = next((line["color"] for line in lines if line["color"] is not None), "")
        shown.append({"title": part.title, "layers": part.layers, "changed": part.changed, "color": first, "lines": lines,
                      "left": part.left})  # fmt: skip
    return shown
