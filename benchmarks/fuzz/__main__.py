"""Fuzzing by a seed, with a result: random networks through passes, damaged folders, random words.

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --minutes 10 --resume
    python -m benchmarks.fuzz --only artifacts --count 500 --seed 7

What failed is named by kind, seed and number: the same again is `--only KIND --seed S --first NUMBER --count 1`. Results of a
full run: fuzz.json and fuzz.md. --resume goes on where those end, and tries again first what failed.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.fuzz.guard import own_seconds
from benchmarks.output import RESULTS, earlier, note, quiet, write

COUNTS = {"checkpoints": 2000, "lines": 20_000, "recipes": 5000, "artifacts": 10_000, "commands": 1000, "networks": 2000}
MOST_OUTCOMES = 12


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
    parser.add_argument("--resume", action="store_true", help="go on with the result that is there, of the kinds named or all")
    options = parser.parse_args()
    if options.resume and (options.count or options.first):
        parser.error("what is resumed is a full run: --count and --first say something else")
    quiet()
    torch.set_num_threads(1)
    is_full = options.resume or not (options.only or options.count or options.first)
    path = (options.out or RESULTS).resolve() / "fuzz.json" if options.out or is_full else None
    report = {"seed": options.seed, "torch": torch.__version__, "rows": [], "faults": []}
    if options.resume:
        report |= earlier(path, report, ("seed", "torch"))
    rows = {row["kind"]: row for row in report["rows"]}
    kinds = options.only or [*COUNTS]
    with tempfile.TemporaryDirectory(prefix="fxc-fuzz-") as folder:
        # What a command line names without a folder goes there.
        os.chdir(folder)
        every = checks(Path(folder), options.seed, kinds)
        for kind in kinds:
            row = rows.setdefault(kind, _new(kind, options.count or COUNTS[kind]))
            for _ in _run(row, every[kind], options.first, 60 * options.minutes, report["faults"]):
                if kind == "networks":
                    row["coverage"] = _coverage(row, options.first, report["faults"])
                report["rows"] = [*rows.values()]
                if path:
                    write(path, report, md=_table(report))
    print(_table(report))
    return 1 if report["faults"] else 0


def _new(kind: str, count: int) -> dict:
    return {"kind": kind, "done": 0, "of": count, "faults": 0, "seconds": 0.0, "slowest": 0.0, "peak_grew_mb": 0.0,
            "outcomes": {}, "declined": ""}  # fmt: skip


def _run(row: dict, check: Callable[[int], str], first: int, seconds: float, faults: list[dict]) -> Iterator[None]:
    """Go on with `row`: what failed, then the numbers after those that are done. Yields now and then, and at the end."""
    kind, began, peak = row["kind"], time.monotonic(), _peak()
    outcomes, before = Counter(row["outcomes"]), row["seconds"]
    failed = [each["number"] for each in faults if each["kind"] == kind]
    faults[:] = [each for each in faults if each["kind"] != kind]
    said = time.monotonic()
    for number in [*failed, *range(first + row["done"], first + row["of"])]:
        if number not in failed and time.monotonic() - began > seconds:
            break
        start = own_seconds()
        try:
            outcome = check(number)
            outcomes[outcome] += 1
            row["declined"] += f" {number}" * outcome.startswith("declined")
        except Exception as error:  # whatever it is, it is a fault, and the next one goes on
            faults.append({"kind": kind, "number": number, "what": f"{type(error).__name__}: {error}"[:1500]})
            note(f"{kind} {number}: {faults[-1]['what'][:600]}")
        row["slowest"] = max(row["slowest"] or 0.0, round(own_seconds() - start, 2))
        row |= {
            "done": row["done"] + (number not in failed), "faults": sum(each["kind"] == kind for each in faults),
            "seconds": round(before + time.monotonic() - began, 1), "outcomes": dict(outcomes.most_common()),
            "peak_grew_mb": max(row["peak_grew_mb"], round((_peak() - peak) / 1024, 1)),
        }  # fmt: skip
        if time.monotonic() - said > 60:
            said = time.monotonic()
            note(f"{kind}: {row['done']} of {row['of']}, {row['faults']} faults")
            yield
    yield


def _coverage(row: dict, first: int, faults: list[dict]) -> dict[str, str]:
    from benchmarks.fuzz import networks

    declined = [*map(int, row["declined"].split())]
    left_out = {*declined, *(each["number"] for each in faults if each["kind"] == "networks")}
    return networks.coverage((n for n in range(first, first + row["done"]) if n not in left_out), declined)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _table(report: dict) -> str:
    lines = [
        "# Fuzzing", "", f"`python -m benchmarks.fuzz`, seed {report['seed']}, torch {report['torch']}, one thread.", "",
        "| what | done | faults | seconds | slowest, s | peak of memory grew, MB | outcomes |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        shown = [*row["outcomes"].items()][:MOST_OUTCOMES]
        outcomes = "; ".join(f"{count}x {name}" for name, count in shown).replace("|", "\\|")
        rest = sum(row["outcomes"].values()) - sum(count for _, count in shown)
        outcomes += f"; {rest}x other" * bool(rest)
        numbers = [row["faults"], row["seconds"], row["slowest"] or "not known", row["peak_grew_mb"]]
        lines.append(f"| {row['kind']} | {row['done']} of {row['of']} | {' | '.join(map(str, numbers))} | {outcomes} |")
    lines += [""] + [f"- {each['kind']} {each['number']}: {each['what'].splitlines()[0]}" for each in report["faults"]]
    for row in report["rows"]:
        lines += [f"- {row['kind']}, {what}: {met}" for what, met in row.get("coverage", {}).items()]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
