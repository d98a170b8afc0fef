"""What removal is worth: two models with 0, 10, 25 and 50 % of their heads and FFN channels gone, in time and in quality.

    python -m benchmarks.removal --threads 2
    python -m benchmarks.removal --quick

Of each share there are three forms: dense (the structure is removed), int8 (removed, then quantized) and masked (only zeroed,
which shows that zeros alone save nothing), each in eager mode and through inductor. The ideal speed-up is the inverse of the
share of multiplications that is left. A full run writes benchmarks/results/removal-<cpu>.json, .md and .svg; one with --quick
is only printed, unless --json names a file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.removal.measure import CRITERION, measure
from benchmarks.removal.plot import svg
from benchmarks.removal.report import markdown
from benchmarks.removal.subjects import MiniLM, PyLM, Subject
from benchmarks.workloads import Encoder
from fxc.kernel_bench.files import slug

SHARES = (0.0, 0.1, 0.25, 0.5)
# As in examples/demo.py, so that the perplexities can be compared.
WINDOWS = 200


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.removal", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0 and 50 %%, small sizes, few rounds: whether it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, help="default: 7, or 2 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; .md and .svg go beside it")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    table.check_counts(parser, options)
    return options


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    protocol = {
        **table.protocol(options),
        "quick": options.quick,
        "criterion": CRITERION,
    }
    report: dict[str, Any] = {"hardware": table.hardware(), "versions": table.versions(), "protocol": protocol, "models": []}
    shares, seconds = ((0.0, 0.5), 0.05) if options.quick else (SHARES, 0.3)
    sizes = ("1x32", "8x128") if options.quick else ("1x32", "8x128", "32x128")
    missing = Encoder([]).missing()
    if missing:
        note(f"left out: {missing}")
    # Standard output is for the tables: what libraries print there goes to standard error.
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        subjects: list[Subject] = [] if missing else [MiniLM(sizes, options.threads)]
        subjects.append(PyLM(20 if options.quick else WINDOWS, options.threads))
        for subject in subjects:
            report["models"].append(measure(subject, shares, options.rounds, seconds))
    print(markdown(report))
    if options.json or not options.quick:
        path = options.json or RESULTS / f"removal-{slug(report['hardware']['cpu'])}.json"
        write(path, report, md=markdown(report), svg=svg(report["models"]))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
