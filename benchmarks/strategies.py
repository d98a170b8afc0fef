"""Every strategy on the bundled language model: what it saves on disk, what it gains in time, what it costs in perplexity.

    python -m benchmarks.strategies --threads 2

Latencies of all of them are taken in turns in one process, batch 1, a prompt of 128 tokens and the mean of 32 decoded ones.
A full run writes benchmarks/results/strategies-<cpu>.json and .md; one with --quick is only printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import fxc
from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.python_source import python_source
from benchmarks.workloads import PYLM
from fxc.analysis.sizes import on_disk
from fxc.data.text import encode, tokenizer_of
from fxc.kernel_bench.files import slug, versions_text
from fxc.lower.inductor import require_compiler
from fxc.measure import bench
from fxc.measure.perplexity import perplexity
from fxc.passes.base import parse_passes
from fxc.source.load import load_source

PRUNE = "prune:heads=0.25:ffn=0.3:criterion=taylor"
STRATEGIES = (
    "int8", "int8:mode=weight_only", "int8:mode=static", "int4", "int4:group=32", "int4:group=32:algorithm=gptq",
    "int4:group=32:algorithm=qronos", "int4:bits=3:group=32:algorithm=gptq", "fp8", "sparse24",
    "sparse24:criterion=sparsegpt,int8", "sparsify:sparsity=0.5:criterion=sparsegpt,pack", PRUNE, f"int8,{PRUNE}",
)  # fmt: skip
QUICK = ("int8", "sparse24")
WINDOWS = 200


def measure(strategies: tuple[str, ...], backend: str, windows: int, rounds: int) -> list[dict]:
    """One row for the model as it comes (transformers, eager), for it compiled and not compressed, and for each strategy."""
    tokens = encode(tokenizer_of(PYLM), (PYLM / "heldout.txt").read_text(encoding="utf-8"))
    names, entries, sizes = ["as it comes", "not compressed"], bench.entries_of(str(PYLM), backend=backend), [on_disk(PYLM)] * 2
    if len(entries) == 1:
        names, sizes = names[:1], sizes[:1]
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration.txt"
        calibration.write_text(python_source(), encoding="utf-8")
        for index, passes in enumerate(strategies):
            note(f"compiling with {passes}")
            learns = any(each.uses_data() for each in parse_passes(passes))
            made = fxc.optimize(PYLM, passes=passes, calib=calibration if learns else None)
            out = Path(scratch) / str(index)
            made.save(out)
            entries += bench.entries_of(str(out), backend=backend)
            names.append(passes)
            sizes.append(on_disk(out))
        note("timing")
        timed = bench.race(entries, [1], [128], new=32, rounds=rounds)
    rows = []
    for name, nbytes, entry, row in zip(names, sizes, entries, timed, strict=True):
        note(f"perplexity of {name}")
        model = load_source(str(PYLM)).model if name == "as it comes" else entry.model
        found = perplexity(model, tokens, limit=windows)
        rows.append(
            {"name": name, "how": entry.how, "disk_bytes": nbytes, "perplexity": found.value, "tokens": found.tokens,
             "ms": {phase: row.median(phase) for phase in row.milliseconds},
             "speedup": {phase: row.speedup(phase, timed[0]) for phase in row.milliseconds},
             "rounds": row.milliseconds, "layers": dict(Counter(each.op for each in getattr(entry.model, "layers", [])))}
        )  # fmt: skip
    return rows


def markdown(report: dict) -> str:
    rows, machine = report["rows"], report["hardware"]
    lines = [
        f"# Every strategy on examples/pylm, {machine['cpu']}",
        "",
        f"{machine['cores']} cores, threads: {report['threads']}, load before: {report['load_before']}, backend "
        f"{report['backend']}, median of {report['rounds']} interleaved rounds, batch 1; perplexity over {rows[0]['tokens']:,} "
        "held-out tokens, nothing was trained afterwards. "
        f"{versions_text(report['versions'])}.",
        "",
        "| passes | on disk | perplexity | prefill of 128, ms | decode of a token, ms | runs its layers as |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['ms'][phase]:.2f} ({row['speedup'][phase]:.2f}x)" for phase in ("prefill", "decode")]
        size = f"{row['disk_bytes'] / 1e6:.2f} MB ({row['disk_bytes'] / rows[0]['disk_bytes']:.2f})"
        forms = ", ".join(f"{count} {form}" for form, count in row["layers"].items()) or row["how"]
        lines.append(f"| {row['name']} | {size} | {row['perplexity']:.3f} | {' | '.join(cells)} | {forms} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", choices=("eager", "inductor"), default="inductor")
    parser.add_argument("--only", nargs="+", metavar="PASSES", help="these strategies instead of all")
    parser.add_argument("--quick", action="store_true", help="two strategies, few windows, nothing written")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    quiet()
    if given.backend == "inductor":
        require_compiler()
    load, rounds = round(os.getloadavg()[0], 2), 2 if given.quick else 7
    strategies, windows = (QUICK, 4) if given.quick else (STRATEGIES, WINDOWS)
    strategies = tuple(given.only or strategies)
    report = {
        "hardware": table.hardware(), "versions": table.versions(), "threads": given.threads, "load_before": load,
        "backend": given.backend, "rounds": rounds, "rows": measure(strategies, given.backend, windows, rounds),
    }  # fmt: skip
    if not given.quick:
        write(RESULTS / f"strategies-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
