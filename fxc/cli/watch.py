"""What `fxc eval --history` and `--fail-over` add to a comparison: a line in a file, a plot of its lines, a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fxc.artifact.manifest import read_manifest
from fxc.artifact.staging import check_writable
from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.digest import digest_of
from fxc.lower.remembered import cpu_name
from fxc.measure import history
from fxc.measure.bench import Entry, race
from fxc.progress import Track
from fxc.report import drift
from fxc.report.console import Output
from fxc.source.load import kind_of

if TYPE_CHECKING:
    from fxc.cli.evaluate import EvalRequest

_LENGTH, _NEW, _ROUNDS = 64, 8, 5
_LAYERS = 20
_PLOTS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Watched:
    """before: the lines that the history has; artifact: the SHA-256 of the artifact's manifest; limit: relative, None for no
    limit."""

    source: str
    against: str
    history: Path | None
    plot: Path | None
    limit: float | None
    before: list[dict[str, Any]]
    artifact: str | None

    def judge(self, result: dict[str, Any], model: CompiledModel, inputs: Any, output: Output) -> dict[str, Any]:
        """Add the line, draw the plot, and raise `VerificationFailed` where quality is worse by more than the limit."""
        measure, value, against, worse = quality(result)
        told: dict[str, Any] = {"measure": measure, "value": value, "against": against, "worse": worse}
        if self.history is not None:
            if not math.isfinite(worse):
                hint = "nothing was added to the history"
                raise VerificationFailed(f"the {measure} is {value}", where=self.source, hint=hint)
            latency = _latency(model, output.track)
            entry = {
                "fxc_history": history.VERSION,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "artifact": self.artifact,
                "original": self.against,
                **told,
                "inputs": result["inputs"],
                "data_sha256": digest_of(each.cpu() for sample in inputs for each in sample),
                "outputs": _finite(result["outputs"]),
                "layers": _finite({each["name"]: each["own"] for each in result["layers"][:_LAYERS]}),
                "milliseconds": latency,
                "versions": {name: metadata.version(name) for name in ("fxc", "torch", "transformers")},
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
            }
            history.append(self.history, entry)
            output.line(f"added line {len(self.before) + 1} to {self.history}")
            if drift.is_there():
                drift.draw([*self.before, entry], self.plot, self.limit)
                output.line(f"drew {self.plot}")
            else:
                output.warn(drift.MISSING)
        said = f"{measure} {against:.4g} -> {value:.4g}" if measure != "relative error" else f"relative error {value:.3%}"
        output.line(f"worse than the original by {worse:.3%} ({said})")
        if self.limit is not None and not worse <= self.limit:
            raise VerificationFailed(
                f"quality is worse than the original's by {worse:.3%}, and --fail-over is {self.limit:.3%}",
                where=self.source,
                why=said,
                hint="compile again with data like this (--calib), or with a milder recipe",
            )
        return told


def quality(result: dict[str, Any]) -> tuple[str, float, float, float]:
    """(measure, of the model, of the original, by how much worse, relative): perplexity where there is one, else accuracy, else
    the relative error of the output, of which the original has none."""
    if "perplexity" in result:
        return "perplexity", result["perplexity"], result["perplexity_against"], result["perplexity_change"]
    if "accuracy" in result:
        own, other = result["accuracy"], result["accuracy_against"]
        return "accuracy", own, other, (other - own) / other if other else 0.0
    error = result["outputs"]["relative_error"]
    return "relative error", error, 0.0, error


def of(request: EvalRequest) -> Watched | None:
    """What is to be watched, checked before anything is loaded: the history that is there, and where it may be written."""
    wanted = {"--history": request.history, "--plot": request.plot, "--fail-over": request.fail_over, "--data": request.data}
    given = [name for name, value in wanted.items() if value is not None]
    if given and request.against is None:
        raise UsageError("this compares with an original", where=given[0], hint="--against MODEL names it")
    if request.plot is not None and request.history is None:
        raise UsageError("a plot is drawn of a history", where="--plot", hint="--history FILE")
    limit = None if request.fail_over is None else _limit(request.fail_over)
    if request.history is None:
        return None if limit is None else Watched(request.model, str(request.against), None, None, limit, [], None)
    if kind_of(request.model) != "artifact":
        raise UsageError("a history is of an artifact", where=request.model, hint="'fxc compile MODEL -o DIR' writes one")
    plot = request.plot or request.history.with_suffix(".svg")
    if plot.suffix not in _PLOTS or plot.resolve() == request.history.resolve():
        raise UsageError(f"no plot can be written to {plot}", where="--plot", hint="name it .svg, .png or .pdf")
    if request.plot is not None and not drift.is_there():
        raise UsageError("matplotlib draws the plot, and is not installed", where="--plot", hint="pip install matplotlib")
    artifact = read_manifest(Path(request.model))["sha256"]
    before = history.read(request.history, artifact)
    for path in (request.history, plot):
        check_writable(path)
    return Watched(request.model, str(request.against), request.history, plot, limit, before, artifact)


def _limit(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"{text!r} is no limit", where="--fail-over", hint="as in 1% or 0.01")
    return value


def _latency(model: CompiledModel, track: Track) -> dict[str, float]:
    """Milliseconds of each phase, batch 1, the median."""
    entry = Entry("it", "fxc", model, model.program, model.program.nbytes())
    longest = getattr(model.config, "max_position_embeddings", None) or _LENGTH + _NEW
    length = max(1, min(_LENGTH, longest - _NEW))
    row = race([entry], [1], [length], new=_NEW, rounds=_ROUNDS, device=str(model.device), track=track)[0]
    return {phase: round(median(each), 4) for phase, each in row.milliseconds.items()}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
