"""Single linear layers: fxc's kernels beside torch's, ONNX Runtime's, OpenVINO's and others', and what the machine allows.

    python -m benchmarks.kernels --threads 2
    python -m benchmarks.kernels --scheme int4 --shapes 4096,4096 --m 1,16 --out /tmp

This is `fxc bench kernels` with a place for its results: benchmarks/results/kernels-<machine>.json, .csv, .md and pictures. A
run with --scheme, --shapes or --m is not a full one, and writes only where --out says. On a machine that does other work too,
set OMP_WAIT_POLICY=PASSIVE (else OpenMP's threads spin against the others) and leave a core free.
"""

import sys
from pathlib import Path

from fxc.cli import app

RESULTS = Path(__file__).resolve().parent / "results"
PARTIAL = ("--scheme", "--shapes", "--m", "--out")


def arguments(given: list[str]) -> list[str]:
    """Those of `fxc` for what was given here."""
    partial = any(each.partition("=")[0] in PARTIAL for each in given)
    return ["bench", "kernels", *given, *([] if partial else ["--out", str(RESULTS)])]


if __name__ == "__main__":
    app(arguments(sys.argv[1:]), prog_name="fxc")
