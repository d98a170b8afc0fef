"""Fuzzing by a seed, with a result: random networks through passes, damaged folders, random words.

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --only artifacts --count 500 --seed 7

What failed is named by kind, seed and number: the same again is `--only KIND --seed S --first NUMBER --count 1`. Results of a
full run: fuzz.json and fuzz.md.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.output import RESULTS, note, quiet, write

COUNTS = {"checkpoints": 2000, "lines": 20_000, "recipes": 5000, "artifacts": 10_000, "commands": 1000, "networks": 2000}


def checks(place: Path, seed: int, wanted: list[str]) -> dict[str, Callable[[int], str]]:
    """Kind -> what to do for a number; it returns an outcome, and raises where there is a fault."""
    from benchmarks.fuzz import folders, networks, words

    made = folders.artifacts(place) if "artifacts" in wanted else []
    stored = folders.checkpoints(place) if "checkpoints" in wanted else []

    def draw(kind: str, number: int) -> random.Random:
        return random.Random(f"{kind}-{seed}-{number}")

    def said(outcome: tuple) -> str:
        return "taken" if outcome[1].said is None else outcome[1].said.partition("]")[0] + "]"

    return {
        "networks": lambda number: networks.check(seed, number, place),
        "artifacts": lambda number: said(folders.check_artifact(made, place, seed, number)),
        "checkpoints": lambda number: said(folders.check_checkpoint(stored, place, seed, number)),
        "lines": lambda number: words.check_line(draw("lines", number)),
        "recipes": lambda number: words.check_recipe(draw("recipes", number), place),
        "commands": lambda number: words.check_command(draw("commands", number), place),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*COUNTS], help="this kind alone; repeatable")
    parser.add_argument("--count", type=int, help="so many of each kind")
    parser.add_argument("--first", type=int, default=0, help="begin with this number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of each kind at most; what was left out is said")
    parser.add_argument("--out", type=Path, help="where to write the result; of a full run it is benchmarks/results")
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    quiet()
    torch.set_num_threads(1)
    kinds = options.only or [*COUNTS]
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="fxc-fuzz-") as folder:
        # What a command line names without a folder goes there.
        os.chdir(folder)
        every = checks(Path(folder), options.seed, kinds)
        for kind in kinds:
            rows.append(_run(kind, every[kind], options, faults))
    report = {"seed": options.seed, "torch": torch.__version__, "rows": rows, "faults": faults}
    print(_table(report))
    is_full = not options.only and options.count is None and not options.first
    if options.out or is_full:
        write((out or RESULTS) / "fuzz.json", report, md=_table(report))
    return 1 if faults else 0


def _run(kind: str, check: Callable[[int], str], options: argparse.Namespace, faults: list[dict]) -> dict:
    count = options.count or COUNTS[kind]
    outcomes: Counter[str] = Counter()
    began, slowest, done = time.monotonic(), 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(options.first, options.first + count):
        if time.monotonic() - began > 60 * options.minutes:
            break
        start = time.perf_counter()
        try:
            outcomes[check(number)] += 1
        except Exception as error:  # whatever it is, it is a fault, and the next one goes on
            faults.append({"kind": kind, "number": number, "what": f"{type(error).__name__}: {error}"[:1500]})
            note(f"{kind} {number}: {faults[-1]['what'][:600]}")
        slowest, done = max(slowest, time.perf_counter() - start), done + 1
        if done % 100 == 0:
            note(f"{kind}: {done} of {count}, {len(faults)} faults")
    return {
        "kind": kind, "done": done, "of": count, "faults": sum(each["kind"] == kind for each in faults),
        "seconds": round(time.monotonic() - began, 1), "slowest": round(slowest, 2),
        "peak_grew_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        "outcomes": dict(outcomes.most_common(12)),
    }  # fmt: skip


def _table(report: dict) -> str:
    lines = [
        "# Fuzzing", "", f"`python -m benchmarks.fuzz`, seed {report['seed']}, torch {report['torch']}, one thread.", "",
        "| what | done | faults | seconds | slowest, s | peak of memory grew, MB | outcomes |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        outcomes = "; ".join(f"{count}x {name}" for name, count in row["outcomes"].items()).replace("|", "\\|")
        numbers = [row["faults"], row["seconds"], row["slowest"], row["peak_grew_mb"]]
        lines.append(f"| {row['kind']} | {row['done']} of {row['of']} | {' | '.join(map(str, numbers))} | {outcomes} |")
    lines += [""] + [f"- {each['kind']} {each['number']}: {each['what'].splitlines()[0]}" for each in report["faults"]]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
