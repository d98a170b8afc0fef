"""What training gives back after compression, strategy by strategy, with the plain way beside it where that is the bar.

    python -m benchmarks.recovery --threads 2
    python -m benchmarks.recovery --only digits
    python -m benchmarks.recovery --only "2 bits" --share 0.2

A full run takes two hours and writes benchmarks/results/recovery-<cpu>.json and .md; one with --only or --share is only
printed, unless --add puts its rows into those files, in the place of rows of the same work.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict

import torch

from benchmarks import table
from benchmarks.output import RESULTS, earlier, quiet, write
from benchmarks.recovery import language, pictures, sentences
from benchmarks.recovery.row import Row
from fxc.kernel_bench.files import slug, versions_text

PARTS = {"digits", "MiniLM", "precisions"}


def measure(only: set[str], share: float, precision: str) -> list[Row]:
    made: list[Row] = []
    if not only or only & {"digits"}:
        made += [*pictures.gradual(), *pictures.slimming(), *pictures.distillation()]
    if not only or only & {"MiniLM"}:
        made += sentences.rows(share, precision)
    if not only or only & {"precisions"}:
        made += language.precisions(share)
    if not only or only - PARTS:
        made += language.rows(only - PARTS, share, precision)
    return made


def markdown(report: dict) -> str:
    machine = report["hardware"]
    lines = [
        f"# Trained after compression, {machine['cpu']}",
        "",
        f"{machine['cores']} cores, threads: {report['threads']}, {report['precision']}; perplexity over {language.WINDOWS} "
        "held-out windows. Seconds are of compressing and training together; load: of the machine before. "
        f"{versions_text(report['versions'])}.",
        "",
        "| work | the model | compressed | trained | seconds | load | bar | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [_measured(row["before"], row[name]) for name in ("without", "after")]
        cells = [row["work"], f"{row['before']:.4g}", *cells, f"{row['seconds']:.0f}"]
        cells += [str(row.get("load_before", "not noted")), row["bar"], f"`{row['how']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _measured(before: float, now: float) -> str:
    """An accuracy or a cosine as it is, a perplexity with what it is above the model's."""
    return f"{now:.4f}" if before <= 1 else f"{now:.3f} ({100 * (now / before - 1):+.2f} %)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    which = "digits, MiniLM, precisions, or a part of the name of a work"
    parser.add_argument("--only", action="append", default=[], help=which)
    parser.add_argument("--share", type=float, default=1.0, help="of the minutes of each work (default 1)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--add", action="store_true", help="put the rows into the results' files")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    quiet()
    load = round(os.getloadavg()[0], 2)
    report = {
        "hardware": table.hardware(), "versions": table.versions(), "threads": given.threads, "precision": given.precision,
        "rows": [],
    }  # fmt: skip
    path = RESULTS / f"recovery-{slug(report['hardware']['cpu'])}.json"
    is_whole = not given.only and given.share == 1
    same = ("hardware", "versions", "threads", "precision") if given.add else None
    if same:  # refused before it begins, and read when it ends: another run may have added rows meanwhile
        earlier(path, report, same)
    made = [asdict(row) | {"load_before": load} for row in measure(set(given.only), given.share, given.precision)]
    fresh = {row["work"] for row in made}
    before = earlier(path, report, same) if same else {}
    report["rows"] = [row for row in before.get("rows", []) if row["work"] not in fresh] + made
    if is_whole or given.add:
        write(path, report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
