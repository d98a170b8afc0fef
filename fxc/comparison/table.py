"""The table of a comparison, for a terminal and as markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fxc.comparison.result import Comparison, Row, latency_of, reason
from fxc.errors import printable
from fxc.kernel_bench.files import markdown_table, versions_text
from fxc.measure.contenders import Latency
from fxc.report.console import size

MEASURES = {
    "perplexity": "perplexity", "accuracy": "accuracy", "cosine": "cosine with the original", "kl": "KL from the original",
}  # fmt: skip


def heads(comparison: Comparison) -> list[str]:
    """A heading that begins with ">" is of a column of numbers."""
    kind = comparison.measured[0].measured.quality.kind
    return ["strategy", ">on disk", ">loaded", *(f">{_column(each)}, ms" for each in comparison.columns), f">{MEASURES[kind]}"]


def _column(column: tuple[str, str]) -> str:
    at, phase = column
    return f"{phase} {at}"


def body(comparison: Comparison) -> list[list[str]]:
    """A row for each strategy; of one without numbers the last cell says what stood in the way."""
    first = comparison.measured[0]
    return [_missing(comparison, row) if row.measured is None else _row(comparison, row, first) for row in comparison.rows]


def _missing(comparison: Comparison, row: Row) -> list[str]:
    what = str(row.why_not["what"])
    return [row.strategy, *["-"] * (2 + len(comparison.columns)), what if len(what) <= 60 else f"{what[:57]}..."]


def _row(comparison: Comparison, row: Row, first: Row) -> list[str]:
    its, disk = row.measured, first.measured.disk_bytes
    return [
        row.strategy,
        f"{size(its.disk_bytes)} ({its.disk_bytes / disk:.2f})" if disk else size(its.disk_bytes),
        size(its.held_bytes),
        *(_latency(latency_of(row, each), latency_of(first, each)) for each in comparison.columns),
        quality_text(row, is_first=row is first),
    ]


def _latency(found: Latency, first: Latency) -> str:
    low, high = found.quartiles
    return f"{found.median:.2f} ± {(high - low) / 2:.2f} ({1 / found.share_of(first):.2f}x)"


def quality_text(row: Row, *, is_first: bool) -> str:
    """The value, of the first row with its standard error, of others with how far from the first row's it is, and the standard
    error of that."""
    quality, (loss, error) = row.measured.quality, row.loss
    if quality.kind == "perplexity":
        return f"{quality.value:.3f}" + (_pm(quality.error, ".3f") if is_first else f" ({loss:+.2%}{_pm(error, '.2%')})")
    if quality.kind == "accuracy":
        points = [None if each is None else 100 * each for each in (quality.error, -loss, error)]
        change = _pm(points[0], ".2f") if is_first else f" ({points[1]:+.2f}{_pm(points[2], '.2f')})"
        return f"{100 * quality.value:.2f} %{change}"
    return f"{quality.value:.4f}{_pm(quality.error, '.4f')}"


def _pm(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def lines(comparison: Comparison) -> list[str]:
    """What stands below the table: what nothing beats, why some could not be made, what the numbers are."""
    found = [f"nothing is smaller and as good: {_names(comparison.by_size())}"]
    for each in comparison.columns:
        found.append(f"nothing is faster at {_column(each)} and as good: {_names(comparison.by_latency(each))}")
    found += [f"{row.strategy}: {reason(row.why_not)}" for row in comparison.rows if row.measured is None]
    return [*found, explanation(comparison), *comparison.notes]


def _names(rows: Sequence[Row]) -> str:
    return "; ".join(row.strategy for row in rows)


def explanation(comparison: Comparison) -> str:
    """What the columns are."""
    known, first = comparison.conditions, comparison.measured[0]
    quality = first.measured.quality
    found = ", found beside the model" if comparison.found else ""
    spread = {
        "perplexity": "± its standard error in the first row, then its relative rise ± the standard error of paired windows",
        "accuracy": "± its standard error in the first row, then its change in points ± the standard error of paired samples",
    }.get(quality.kind, "± its standard error")
    return (
        "on disk: what makes the model run, and as a share of the first row; loaded: weights as this machine holds them; "
        f"milliseconds: median of {known['rounds']} rounds in which all take turns, ± half of the interquartile range, and how "
        f"many times as fast as the first row; threads: {known['threads']}; the first row runs as {first.measured.how}, the "
        f"others as fxc {known['backend']}; {MEASURES[quality.kind]}: over {quality.count:,} {quality.of} of "
        f"{comparison.data}{found}, {spread}"
    )


def title(comparison: Comparison) -> str:
    return f"strategies for {comparison.model}"


def markdown(comparison: Comparison, pictures: Sequence[str]) -> str:
    """The whole comparison. pictures: names of files beside it."""
    known = comparison.conditions
    machine = known["machine"]
    names = [name.removeprefix(">") for name in heads(comparison)]
    cells = [[_code(row[0]), *row[1:]] for row in ([printable(cell) for cell in row] for row in body(comparison))]
    about = (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags']) or 'no vector flags known'}), threads: "
        f"{known['threads']}, load before: {known['load_before']}, seed: {known['seed']}. {versions_text(known['versions'])}."
    )
    text = [f"# {_plain(title(comparison))}", "", about, "", *markdown_table(names, cells), ""]
    text += [f"- {_plain(line)}" for line in lines(comparison)]
    text += ["", *(f"![{name.removesuffix('.svg').replace('_', ' ')}]({name})" for name in pictures)] if pictures else []
    return "\n".join(text) + "\n"


def _code(text: str) -> str:
    """As code in a cell, whatever is in it."""
    return f"`{text}`" if "`" not in text else _plain(text)


def _plain(text: str) -> str:
    """Text that markdown takes as text."""
    cleaned = printable(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{each}" if each in "`*_[]" else each for each in cleaned)
