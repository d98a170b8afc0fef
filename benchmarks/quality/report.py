"""The comparison for reading."""

from __future__ import annotations

from typing import Any

from benchmarks.table import versions_text
from fxc.kernel_bench.files import markdown_table

# Three draws of the calibration windows moved GPTQ and SparseGPT of a model of this size by so much.
TIES = "Under 0.13 % at 4 bits and 0.5 % at 2:4 the choice of the calibration windows decides: such differences are ties."


def markdown(report: dict[str, Any]) -> str:
    machine, protocol = report["hardware"], report["protocol"]
    tokens = protocol["evaluated"] * (protocol["window"] - 1)
    lines = [
        f"# Quality on examples/pylm, {machine['cpu']}",
        "",
        f"Change in perplexity over {tokens:,} held-out tokens against the bfloat16 original, ± the standard error of the "
        f"paired differences by window, from the folder that was written, loaded in a new process. Calibration: "
        f"{protocol['calibration']} windows of {protocol['window']} tokens, the same for all. Seconds and the most memory of "
        f"compressing; MB: weights on disk. {machine['cores']} cores, threads: {protocol['threads']}{_load(report)}. "
        f"{versions_text(report['versions'])}. {TIES}",
    ]
    for title, entries in report["formats"].items():
        rows = [[name, *_cells(entry)] for name, entry in entries.items()]
        lines += ["", f"## {title}", "", *markdown_table(["", "perplexity", "seconds", "memory, MB", "MB"], rows)]
    return "\n".join(lines) + "\n"


def _load(report: dict[str, Any]) -> str:
    """How busy the machine was before each row."""
    loads = [entry["load"] for entries in report["formats"].values() for entry in entries.values()]
    if not loads:
        return ""
    busy = "; where it is above 1, seconds are upper bounds" if max(loads) > 1 else ""
    return f", load before a row: {min(loads)} to {max(loads)}{busy}"


def _cells(entry: dict[str, Any]) -> list[str]:
    if "failed" in entry:
        return [f"failed: {entry['failed']}", "-", "-", "-"]
    change = f"{100 * entry['change']:+.2f} % ±{100 * entry['spread']:.2f}"
    return [change, f"{entry['seconds']:.1f}", f"{entry['memory'] / 1e6:.0f}", f"{entry['bytes'] / 1e6:.2f}"]
