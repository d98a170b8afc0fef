"""The results as files: JSON with everything, CSV with a line for each row, markdown to read, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxc.kernel_bench import plots
from fxc.kernel_bench.files import markdown_table, versions, versions_text, write_texts
from fxc.kernel_bench.limits import Peaks
from fxc.kernel_bench.run import Result, Row
from fxc.kernel_bench.summary import Line, summarise
from fxc.kernel_bench.tune import table as tuned_table

PACKAGES = ("fxc", "torch", "triton")
COLUMNS = (
    "shape", "n", "k", "m", "regime", "scheme", "contender", "ours", "baseline", "state", "reason", "form", "copies", "error",
    "us", "p20", "p80", "speedup", "gbps", "tflops",
)  # fmt: skip
SUMMARY = ("regime", "scheme", "contender", ">cells", ">speed-up", ">worst", "worst cell", ">of roofline", ">worst of roofline")


@dataclass
class Report:
    """One run. about: of the machine; protocol: how it was measured; peaks: (datasheet, measured), None for what there is not;
    tuning: the configurations that were left out, and why, where some were tried; packages: those whose versions matter."""

    result: Result
    about: dict[str, Any]
    protocol: dict[str, Any]
    peaks: Sequence[Peaks | None]
    tuning: dict[str, str] | None = None
    packages: Sequence[str] = PACKAGES


def as_json(report: Report) -> dict[str, Any]:
    """Everything there is to know of a run, numbers in six digits; infinities, which JSON does not have, become null."""
    return _short({
        "device": report.about,
        "versions": versions(report.packages),
        "protocol": report.protocol,
        "peaks": {name: asdict(each) if each else None for name, each in zip(("datasheet", "measured"), report.peaks)},
        "summary": [asdict(line) for line in summarise(report.result.rows)],
        **report.result.as_dict(),
        "configurations_left_out": report.tuning,
    })  # fmt: skip


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "limit_us_datasheet", "fraction_datasheet", "limit_us_measured", "fraction_measured"])
    for row in rows:
        bounds = [each.get(name) for name in ("datasheet", "measured") for each in (row.limit_us, row.fraction)]
        values = [*(getattr(row, name) for name in COLUMNS), *bounds]
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    return text.getvalue()


def summary_cells(lines: Sequence[Line]) -> list[list[str]]:
    """In the order of SUMMARY."""
    return [
        [line.regime, line.scheme, line.contender, str(line.cells), _times(line.speedup), _times(line.worst_speedup),
         line.worst_cell, _percent(line.fraction), _percent(line.worst_fraction)]
        for line in lines
    ]  # fmt: skip


def shape_cells(rows: Sequence[Row], ms: Sequence[int]) -> list[list[str]]:
    """A line for each contender: its scheme, its name with how it runs, and for each m "us  speed-up  share of roofline"."""
    names = list(dict.fromkeys((row.scheme, row.contender) for row in rows))
    found = {(row.scheme, row.contender, row.m): row for row in rows}
    made = []
    for scheme, name in names:
        cells = [found.get((scheme, name, m)) for m in ms]
        forms = dict.fromkeys(row.form for row in cells if row and row.form)
        made.append([scheme, name + (f" ({'; '.join(forms)})" if forms else ""), *map(_cell, cells)])
    return made


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.us is None:
        return row.state
    share = row.fraction.get("datasheet") or row.fraction.get("measured")
    return f"{row.us:.1f}  {_times(row.speedup)}  {_percent(share)}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"x{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def shapes_of(result: Result) -> dict[str, list[Row]]:
    """ "name N x K" -> its rows."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        found.setdefault(f"{row.shape} {row.n} x {row.k}", []).append(row)
    return found


def peaks_text(peaks: Sequence[Any]) -> str:
    """What the machine can, in one line."""
    parts = []
    for each in peaks:
        if each:
            rates = [f"{name} {value / 1e12:.3g} TFLOP/s" for name in ("float32", "bf16", "int8", "fp8")
                     if (value := getattr(each, name))]  # fmt: skip
            read = f"{each.bandwidth / 1e9:.4g} GB/s"
            if each.one_thread and each.one_thread != each.bandwidth:
                read += f" ({each.one_thread / 1e9:.4g} GB/s by one thread)"
            parts.append(f"{each.source}: {read}, {', '.join(rates)}")
    return "; ".join(parts)


def telemetry_text(result: Result) -> str:
    """The ranges of what nvidia-smi said during the races."""
    parts = []
    for name, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "°C")):
        if values := [each[name] for each in result.telemetry]:
            parts.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
    return f"while timing {', '.join(parts)}" if parts else ""


def remarks(result: Result) -> list[str]:
    """What is not in the tables, and why."""
    wrong = [f"{row.contender} at {row.n} x {row.k}, M={row.m}: {row.state}, {row.reason}" for row in result.rows if row.reason]
    above = [share for row in result.rows for share in row.fraction.values() if share and share > 1.0]
    why = "a weight that stays in a cache is read faster than memory is, and measured peaks are what the machine gave just then"
    return [
        *([f"shares above 100 %, up to {max(above):.0%}: {why}"] if above else []),
        *(f"{name}: not measured, {reason}" for name, reason in result.absent.items()),
        *(f"{each.what}: skipped, {each.reason}" for each in result.skipped),
        *wrong,
    ]


def as_markdown(report: Report, pictures: Sequence[str]) -> str:
    present = versions_text(versions(report.packages))
    facts = ", ".join(f"{name}: {value}" for name, value in report.protocol.items() if value is not None)
    about = [report.about["timing"], report.about["weights"], peaks_text(report.peaks), telemetry_text(report.result)]
    lines = [
        f"# Linear layers on {report.about['name']}",
        "",
        " ".join([f"{present}. {facts}.", *(f"{text[0].upper()}{text[1:]}." for text in about if text)]),
        "",
        "Each cell: microseconds (median over rounds), times faster than the fastest dense bfloat16 baseline of the same race, "
        "share of the roofline (datasheet peaks where there are such, else measured ones). Every result was compared with "
        "float32 before it was timed.",
        *(f"\n![{name}]({name})" for name in pictures),
    ]
    for title, rows in shapes_of(report.result).items():
        ms = sorted({row.m for row in rows})
        lines += ["", f"## {title}", "", *markdown_table(["scheme", "", *(f"M={m}" for m in ms)], shape_cells(rows, ms))]
    heads = [each.removeprefix(">") for each in SUMMARY]
    lines += [
        "",
        "## Summary: geometric means and worst cells",
        "",
        *markdown_table(heads, summary_cells(summarise(report.result.rows))),
    ]
    lines += ["", *(f"- {line}" for line in remarks(report.result))]
    return "\n".join(lines).rstrip() + "\n"


def write(stem: Path, report: Report, draw: bool = True) -> tuple[list[Path], str | None]:
    """stem.json, .csv, .md and, to draw, -roofline.png and -speedup.png; <chip>.json beside them where configurations were
    tried: (their paths, why there are no pictures or None)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    pictures, missing = plots.draw(stem, report.result, report.peaks) if draw else ([], None)
    texts = {
        f"{stem.name}.json": json.dumps(as_json(report), indent=1) + "\n",
        f"{stem.name}.csv": as_csv(report.result.rows),
        f"{stem.name}.md": as_markdown(report, [path.name for path in pictures]),
    }
    if report.tuning is not None:
        table = tuned_table(report.result, report.about["chip"], versions(report.packages))
        texts[f"{report.about['chip']}.json"] = json.dumps(table, indent=1) + "\n"
    return [*write_texts(stem.parent, texts), *pictures], missing
