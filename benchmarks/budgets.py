"""Random budgets of size on the bundled language model: what `fxc search` finds within each, against the best recipe made by
hand that fits.

    python -m benchmarks.budgets --threads 2
    python -m benchmarks.budgets --quick

Data is read, and calibration and predictions made, once; what was measured for one budget is not measured again for another. A
full run writes benchmarks/results/budgets-<cpu>.json and .md; a quick one only prints. Exits with 1 where a search was worse.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import strategies, table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.python_source import python_source
from benchmarks.workloads import PYLM
from fxc.captured import Captured, capture_source
from fxc.compiled.model import CompiledModel
from fxc.kernel_bench.files import markdown_table, slug
from fxc.measure.quality import Evaluation, evaluation_of
from fxc.options import Options
from fxc.passes.base import parse_passes
from fxc.selection.budget import Budget
from fxc.selection.formats import Format, parse_formats
from fxc.selection.prediction import predictions_of
from fxc.selection.search import TRIALS, checked
from fxc.selection.steps import Steps
from fxc.selection.trials import Plan, Trial, Trials

LOW, HIGH = 0.4, 0.66
"""Shares of the original's bytes: from where the first recipe made by hand fits to where the last does."""
BY_HAND = ("int8:mode=weight_only", "int8", "int8:mode=static", "int4", "sparse24", "sparse24,int8", *strategies.MORE["pylm"])
"""Those of the README's tables that train nothing."""


class Remembered(Trials):
    """Of several searches of one model: no recipe is measured twice."""

    known: dict[tuple[str, ...], tuple[Trial, CompiledModel | None]]

    def measured(self, plan: Plan) -> tuple[Trial, CompiledModel | None]:
        key = tuple(plan.recipe)
        if key not in self.known:
            self.known[key] = super().measured(plan)
        trial, model = self.known[key]
        return replace(trial, plan=plan), model

    def again(self) -> Remembered:
        """For the next search."""
        fresh = copy.copy(self)
        fresh.done, fresh._began = [], time.monotonic()
        return fresh


def drawn(count: int, seed: int) -> list[float]:
    """Shares of the original's bytes, from small to large."""
    generator = random.Random(seed)
    return sorted(round(generator.uniform(LOW, HIGH), 3) for _ in range(count))


def compared(
    captured: Captured, options: Options, evaluation: Evaluation, formats: Sequence[Format], by_hand: Sequence[str],
    shares: Sequence[float], trials: int,
) -> dict[str, Any]:  # fmt: skip
    """What was found within each of `shares` of the original's bytes, and the best of `by_hand` that fits. worse: budgets
    within which the search lost more than that, by any margin."""
    began = time.monotonic()
    predictions = predictions_of(captured, options, formats)
    predicting = time.monotonic() - began
    measured = Remembered(captured, options, predictions.samples, evaluation, trials, say=note)
    measured.known = {}
    hand = []
    for text in by_hand:
        note(f"by hand: {text}")
        hand.append(measured.measured(Plan(parse_passes(text), text, "by hand"))[0])
    rows = []
    for share in shares:
        budget, began = Budget(size=share), time.monotonic()
        note(f"searching within {budget}")
        found = Steps(captured, options, budget, predictions, measured.again()).run()
        fitting = [each for each in hand if not each.misses(budget, captured.nbytes)]
        rival = min(fitting, key=lambda each: each.loss, default=None)
        rows.append({
            "budget": str(budget), "seconds": round(time.monotonic() - began, 1), "trials": len(found.trials),
            "rank_correlation": found.correlation, "found": found.best.as_json(),
            "by_hand": None if rival is None else rival.as_json(),
            "is_worse": rival is not None and found.best.loss > rival.loss,
        })  # fmt: skip
    return {
        "original_bytes": captured.nbytes, "original_quality": measured.quality.as_json(),
        "seconds_of_predictions": round(predicting, 1), "by_hand": [each.as_json() for each in hand], "budgets": rows,
        "worse": [row["budget"] for row in rows if row["is_worse"]],
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    original = found["original_bytes"]

    def cells(trial: dict[str, Any] | None) -> list[str]:
        if trial is None:
            return ["none fits", "", ""]
        error = "" if trial["standard_error"] is None else f" ± {trial['standard_error']:.3%}"
        return [f"{trial['loss']:+.3%}{error}", f"{trial['disk_bytes'] / original:.3f}x", f"`{trial['name']}`"]

    rows = [
        [
            row["budget"], *cells(row["found"])[:2], *cells(row["by_hand"]), "worse" if row["is_worse"] else "",
            str(row["trials"]),
        ]
        for row in found["budgets"]
    ]  # fmt: skip
    heads = ["budget", "search: loss", "on disk", "by hand: loss", "on disk", "which", "", "measured"]
    quality = found["original_quality"]
    return "\n".join([
        "# Random budgets of size on examples/pylm", "",
        f"{quality['kind']} over {quality['count']:,} {quality['of']}; loss is its relative rise. The search is worse than the "
        f"best recipe made by hand that fits in {len(found['worse'])} of {len(rows)}.", "", *markdown_table(heads, rows), "",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of the budgets")
    parser.add_argument("--count", type=int, default=10, help="how many budgets")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search, at most")
    parser.add_argument("--quick", action="store_true", help="two budgets, few samples and trials, nothing written")
    given = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(given.threads)
    few = {"calib_samples": 8} if given.quick else {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calib.txt"
        text.write_text(python_source(), encoding="utf-8")
        options = checked(Options("", calib=text, **few))
        captured = capture_source(PYLM, None, options)
        evaluation = evaluation_of(captured, PYLM / "heldout.txt", samples=8 if given.quick else None)
        formats, hand = parse_formats(None, captured.program), BY_HAND[1:4] if given.quick else BY_HAND
        shares, trials = drawn(2 if given.quick else given.count, given.seed), 5 if given.quick else given.trials
        found = compared(captured, options, evaluation, formats, hand, shares, trials)
    print(markdown(found))
    if not given.quick:
        hardware = table.hardware()
        about = {"hardware": hardware, "versions": table.versions(), "threads": given.threads, "seed": given.seed}
        write(RESULTS / f"budgets-{slug(hardware['cpu'])}.json", about | found, md=markdown(found))
    return 1 if found["worse"] else 0


if __name__ == "__main__":
    sys.exit(main())
