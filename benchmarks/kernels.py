"""Single linear layers: fxc's kernels beside torch's and the rivals in benchmarks/kernel_peers, and what the machine allows.

    python -m benchmarks.kernels --threads 1,2
    python -m benchmarks.kernels --scheme int4 --shapes 4096,4096 --m 1,16 --out /tmp

This is `fxc bench kernels` with those rivals and a place for its results: benchmarks/results/kernels-<machine>.json, .csv, .md
and pictures, with several numbers of threads a set for each. A run with --scheme, --shapes or --m is not a full one, and writes
only where --out says. On a machine that does other work too, set OMP_WAIT_POLICY=PASSIVE (else OpenMP's threads spin against
the others) and leave a core free.

Where typer or rich are missing, as on a machine that somebody lends, the same runs with plain output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

from benchmarks.output import RESULTS
from fxc.errors import FxcError, UsageError

PEERS = "benchmarks.kernel_peers"
PARTIAL = ("--scheme", "--shapes", "--m", "--out")


def arguments(given: list[str]) -> list[str]:
    """Those of `fxc` for what was given here."""
    partial = any(each.partition("=")[0] in PARTIAL for each in given)
    return ["bench", "kernels", "--peers", PEERS, *given, *([] if partial else ["--out", str(RESULTS)])]


class PlainOutput:
    """What the command needs of `fxc.report.console.Output`, which is made of rich."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def line(self, text: object = "") -> None:
        if not self.as_json:
            print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.line(title)
        for row in [[each.removeprefix(">") for each in columns], *rows]:
            self.line("  " + " | ".join(map(str, row)))

    def json(self, value: Any) -> None:
        if self.as_json:
            print(json.dumps(value, indent=2, allow_nan=False), flush=True)

    def note(self, text: object) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        self.note(f"{what} ...")
        yield


def _sizes(option: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not all(each.strip().isdecimal() and int(each) for each in text.split(",")):
        raise UsageError(f"{text!r} is not a list of sizes", where=option, hint="as in 1,8,32")
    return tuple(dict.fromkeys(int(each) for each in text.split(",")))


def run_plainly(given: list[str]) -> int:
    """The command without typer and rich: (its exit code)."""
    from fxc.cli.bench_kernels import KernelsRequest, bench_kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--scheme", "--shapes", "--m", "--device", "--threads", "--peers"):
        parser.add_argument(name)
    for name, kind in (("--rounds", int), ("--out", Path), ("--budget-seconds", float)):
        parser.add_argument(name, type=kind)
    for name in ("--tune", "--json"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args(given)
    try:
        rows, threads = _sizes("--m", options.m), _sizes("--threads", options.threads)
        bench_kernels(PlainOutput(options.json), KernelsRequest(
            options.scheme, options.shapes, rows, options.device, threads, options.rounds, options.out, options.tune,
            options.budget_seconds, options.peers,
        ))  # fmt: skip
    except FxcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def main(given: list[str]) -> int:
    if any(util.find_spec(name) is None for name in ("typer", "rich")):
        return run_plainly(arguments(given)[2:])
    from fxc.cli.app import app

    app(arguments(given), prog_name="fxc")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
