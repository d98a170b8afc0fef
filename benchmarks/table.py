"""The results of one run as plain data (JSON), as a rich table and as markdown."""

import argparse
import os
import platform

import torch
from rich.table import Table

from benchmarks.timing import Timing
from fxc.kernel_bench.cpu_platform import FLAGS, kind_of_cpu
from fxc.kernel_bench.files import markdown_table, versions_text
from fxc.kernel_bench.files import versions as versions_of

PACKAGES = ["fxc", "torch", "transformers", "onnxruntime", "onnxscript", "openvino", "nncf", "torchao"]


def hardware() -> dict:
    """The kind of CPU, physical cores, and which of the instructions are there that fast kernels need."""
    able = torch.cpu.get_capabilities()
    return {
        "cpu": kind_of_cpu(),
        "cores": able.get("num_physical_cores", os.cpu_count()),
        "flags": [flag for flag in FLAGS if able.get(flag)],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of each package, its version, or None when it is not installed."""
    return versions_of(PACKAGES)


def check_counts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")


def protocol(options: argparse.Namespace) -> dict:
    """How it is measured, and how busy the machine is before."""
    return {"threads": options.threads, "rounds": options.rounds, "load_before": round(os.getloadavg()[0], 2)}


def conditions(report: dict) -> str:
    """On what machine and how a report's times were taken, in a sentence or two."""
    machine, protocol = report["hardware"], report["protocol"]
    return (
        f"{machine['cores']} cores ({', '.join(machine['flags']) or 'none known'}), threads: {protocol['threads']}, "
        f"interleaved rounds: {protocol['rounds']}, load before the run: {protocol['load_before']}. "
        f"{versions_text(report['versions'])}."
    )


def record(timing: Timing, baseline: Timing, cosine: float) -> dict:
    """One cell. ms and rounds in milliseconds; speedup: times faster than the first row, paired by round."""
    return {
        "ms": round(timing.median, 4),
        "low": round(timing.low, 4),
        "high": round(timing.high, 4),
        "speedup": round(timing.speedup_over(baseline), 3),
        "cosine": round(cosine, 5),
        "rounds": [round(each, 4) for each in timing.rounds],
    }


def cells(result: dict) -> list[list[str]]:
    """Of each row: name, "median  speedup" over "low-high" per size, and the worst cosine. No time is "-"."""
    made = []
    for name, row in result["rows"].items():
        line = [name]
        for size in result["sizes"]:
            cell = row.get(size)
            line.append("{ms:.2f}  {speedup:.2f}x\n{low:.2f}-{high:.2f}".format(**cell) if cell else "-")
        line.append(f"{min(cell['cosine'] for cell in row.values()):.4f}" if row else "-")
        made.append(line)
    return made


def remarks(result: dict) -> list[str]:
    """Why rows are left out, and in which form fxc's layers run, which a row's name does not tell."""
    runs = {name: ", ".join(f"{count} {op}" for op, count in ops.items()) for name, ops in result["layers"].items()}
    return [f"{name}: {reason}" for name, reason in result["left_out"].items()] + [
        f"{name} runs its layers as: {forms}" for name, forms in runs.items()
    ]


def rich_table(result: dict) -> Table:
    table = Table(title=result["title"], caption="median over rounds, times faster than the first row; lowest-highest")
    table.add_column("", no_wrap=True)
    for name in [*result["sizes"], "cosine"]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in cells(result):
        table.add_row(*line)
    return table


def markdown(report: dict) -> str:
    """The whole report for reading: the machine, then one table per workload with its left-out rows below."""
    lines = [
        f"# Latency on {report['hardware']['cpu']}",
        "",
        f"{conditions(report)} Each cell: median over rounds in ms, times faster than the first row, lowest-highest.",
    ]
    for result in report["workloads"]:
        body = [[cell.replace("\n", "<br>") for cell in line] for line in cells(result)]
        lines += ["", f"## {result['title']}", "", *markdown_table(["", *result["sizes"], "worst cosine"], body)]
        lines += ["", *(f"- {line}" for line in remarks(result))]
    return "\n".join(lines) + "\n"
