"""fxc search."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fxc.artifact.manifest import replaceable
from fxc.artifact.staging import check_target
from fxc.report.console import Output, ratio, size
from fxc.selection.found import AGREES, Found, check_free, files_beside
from fxc.selection.search import search
from fxc.selection.trials import Trial
from fxc.source.load import kind_of

_LONGEST, _SHOWN = 100, 6


def search_model(output: Output, model: str, out: Path, overwrite: bool, options: dict[str, Any]) -> None:
    local = kind_of(model) in ("folder", "artifact")
    check_target(out, Path(model).expanduser() if local else None, replaceable if overwrite else None, 0)
    check_free(files_beside(out), overwrite)
    found = search(model, track=output.track, say=output.note, **options)
    recipe, record = found.save(out, overwrite=overwrite)
    _show(output, found)
    data = f" --calib {shlex.quote(str(options['calib']))}"
    output.line(f"written to {out}, the recipe to {recipe}, all that was predicted and measured to {record}")
    output.line(f"the same again: fxc compile {shlex.quote(model)} --recipe {shlex.quote(str(recipe))}{data} -o OTHER")
    output.json(found.as_json() | {"out": str(out), "recipe_file": str(recipe), "record_file": str(record)})


def _show(output: Output, found: Found) -> None:
    wanted = {"quality": "the least loss", "size": "the smallest", "latency": "the fastest"}[found.budget.optimised]
    optimised, best = found.budget.optimised, found.best
    ordered = sorted(found.trials, key=lambda t: (bool(_misses(found, t)), t.value(optimised)))
    times = list(best.latencies)
    rows = [(_mark(found, each), *_cells(found, each, times), each.plan.kind, each.plan.name[:_LONGEST]) for each in ordered]
    heads = ["", ">on disk", ">predicted loss", ">measured loss", *(f">{each}" for each in times), "how", "what"]
    output.table(f"{wanted} within {found.budget}: {len(rows)} measured, the best first", heads, rows)
    if found.unmeasured:
        output.line(f"not measured, because they were predicted to be far from it: {len(found.unmeasured)} uniform choices")
    if found.untried:
        shown = "; ".join(found.untried[:_SHOWN]) + (" ..." if len(found.untried) > _SHOWN else "")
        output.line(f"not tried, because {found.ended_by}: {shown}")
    if found.correlation is not None:
        agree = "" if found.correlation >= AGREES else f", which is below {AGREES}: go by what was measured"
        output.line(f"predicted and measured losses: rank correlation {found.correlation:.2f}{agree}")
    original = found.original_bytes
    latencies = "".join(f"; {name} {share:.3f}x" for name, share in best.latencies.items())
    loss = f"{best.loss:+.3%}" + (f" ± {best.error:.3%}" if best.error is not None else "")
    output.line(
        f"the best: {size(original)} -> {size(best.disk_bytes)} ({ratio(best.disk_bytes, original)}); "
        f"{found.quality.kind} {found.quality.value:.4f}, loss {loss}{latencies}"
    )


def _misses(found: Found, trial: Trial) -> dict[str, float]:
    return trial.misses(found.budget, found.original_bytes)


def _mark(found: Found, trial: Trial) -> str:
    return "best" if trial is found.best else "over" if _misses(found, trial) else ""


def _cells(found: Found, trial: Trial, times: list[str]) -> list[str]:
    predicted = "" if trial.plan.predicted is None else f"{trial.plan.predicted:.3%}"
    if trial.failed is not None:
        return ["", predicted, "failed", *("" for _ in times)]
    measured = f"{trial.loss:.3%}" + (f" ± {trial.error:.3%}" if trial.error is not None else "")
    return [size(trial.disk_bytes), predicted, measured, *(f"{trial.latencies[each]:.3f}x" for each in times)]
