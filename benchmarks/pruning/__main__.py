"""Structured pruning of 21 models: fxc, with one line for all of them, beside torch-pruning, with what each needs by hand.

    python -m benchmarks.pruning
    python -m benchmarks.pruning --models qwen2_gqa,bert --no-peer
    python -m benchmarks.pruning --ratios

A quarter of the heads and 30 % of the feed-forward and convolution channels go. What is kept must compute what the masked
model computes (float64), run at another size, generate, be saved and loaded, and be quantized. --ratios: besides, one decoder
at each ratio of query to KV heads. torch-pruning runs in a process of its own for each model, with a limit, because at some
ratios it does not come back. A full run writes benchmarks/results/pruning-<cpu>.json and .md; one with --models is only
printed, unless --out names a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.pruning.models import EVERY, MODELS, RATIOS
from benchmarks.pruning.ours import PASSES, ours
from benchmarks.pruning.outcome import Record, tried, whole
from benchmarks.pruning.peer import peer, peer_version, theirs
from benchmarks.pruning.report import markdown, parts, show, works
from fxc.kernel_bench.files import slug
from fxc.report import machine


def measure(names: Sequence[str], with_peer: bool, seconds: float) -> list[Record]:
    results = []
    for name in names:
        entry: Record = {"name": name}
        note(f"{name}: fxc")
        with torch.no_grad():
            entry["fxc"] = whole(tried(lambda name=name: ours(EVERY[name])))
        if with_peer:
            note(f"{name}: torch-pruning")
            entry["torch-pruning"] = theirs(name, seconds)
        results.append(entry)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help=f"with commas between; default: {', '.join(m.name for m in MODELS)}")
    parser.add_argument("--ratios", action="store_true", help="besides, every ratio of query to KV heads")
    parser.add_argument("--no-peer", action="store_true", help="fxc alone")
    parser.add_argument("--peer-seconds", type=float, default=120, help="torch-pruning's limit for one model (default 120)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: benchmarks/results, for a full run")
    parser.add_argument("--peer", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = [name.strip() for name in options.models.split(",") if name.strip()]
    if unknown := [name for name in options.models if name not in EVERY]:
        parser.error(f"--models {','.join(unknown)}: there are {', '.join(EVERY)}")
    if options.threads < 1 or options.peer_seconds <= 0:
        parser.error("--threads must be at least 1 and --peer-seconds positive")
    return options


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    if options.peer:
        name, out = options.peer
        Path(out).write_text(json.dumps(whole(tried(lambda: peer(EVERY[name])))), encoding="utf-8")
        return 0
    version = peer_version()
    protocol = {"threads": options.threads, "peer_seconds": options.peer_seconds, "passes": PASSES}
    protocol["load_before"] = round(os.getloadavg()[0], 2)
    found = {f.name: f.value for f in machine.examine() if f.group == "cpu"}
    report: Record = {
        "hardware": table.hardware() | {"memory": found["memory"]},
        "versions": {**table.versions(), "torch-pruning": version},
        "protocol": protocol,
        "absent": None if version or options.no_peer else "pip install torch-pruning",
    }
    with_peer = version is not None and not options.no_peer
    console = Console(width=None if sys.stdout.isatty() else 200)
    with contextlib.redirect_stdout(sys.stderr):
        names = options.models or [each.name for each in MODELS]
        report["models"] = measure(names, with_peer, options.peer_seconds)
        report["ratios"] = measure([m.name for m in RATIOS] if options.ratios else [], with_peer, options.peer_seconds)
    for title, entries in parts(report):
        show(console, title, entries)
    if report["absent"]:
        console.print(f"torch-pruning is absent: {report['absent']}")
    if options.out or not options.models:
        folder = options.out or RESULTS
        write(folder / f"pruning-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    return 0 if all(works(entry["fxc"]) for _, entries in parts(report) for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
