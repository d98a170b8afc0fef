"""What a choice is really worth: it is compiled, as `fxc compile` does it, and measured."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fxc.analysis.sizes import on_disk
from fxc.captured import Captured
from fxc.compiled.model import CompiledModel, compiled_model
from fxc.compiler import compile_captured
from fxc.data.labels import Samples
from fxc.errors import UsageError, VerificationFailed
from fxc.measure.contenders import Contender, Size, compiled, timed
from fxc.measure.quality import Evaluation, Quality
from fxc.options import Options
from fxc.passes.base import Pass
from fxc.progress import Say, in_words, unsaid
from fxc.selection.budget import Budget


@dataclass(frozen=True)
class Plan:
    """passes: of the recipe; name: what it is, in words; kind: "uniform" (one format for all layers), "predicted" (the best by
    prediction), "swapped" (another than the best in one group or two), or what else was changed; choice: the format of each
    group; predicted: the loss, None where nothing predicts it."""

    passes: tuple[Pass, ...]
    name: str
    kind: str
    choice: tuple[int, ...] | None = None
    predicted: float | None = None

    @property
    def recipe(self) -> list[str]:
        return [str(each) for each in self.passes]


@dataclass(frozen=True)
class Trial:
    """A plan, measured. loss, error: as of `Quality.loss_against`, against the model as it came; nbytes: of the constants;
    disk_bytes: of the artifact; latencies: "1x128 prefill" -> the share of the original's; failed: why it could not be
    compiled, in which case nothing was measured."""

    plan: Plan
    loss: float = float("inf")
    error: float | None = None
    nbytes: int = 0
    disk_bytes: int = 0
    latencies: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None

    @property
    def slowest(self) -> float:
        return max(self.latencies.values(), default=float("inf"))

    def value(self, optimised: str) -> tuple[float, float]:
        """Of two that fit the one with less of it is better; with as much, the one that was predicted to lose less."""
        by = {"quality": self.loss, "size": float(self.disk_bytes), "latency": self.slowest}[optimised]
        return by, self.loss if self.plan.predicted is None else self.plan.predicted

    def misses(self, budget: Budget, original_bytes: int) -> dict[str, float]:
        """Of each budget that it does not meet, by what share of the budget it is beyond; {} where it fits."""
        if self.failed is not None:
            return {"compiled": float("inf")}
        found = {}
        if self.disk_bytes > (most := budget.most_bytes(original_bytes)):
            found["size"] = self.disk_bytes / most - 1
        if budget.latency is not None and self.slowest > budget.latency:
            found["latency"] = self.slowest / budget.latency - 1
        if budget.quality is not None and self.loss > budget.quality:
            # A budget of nothing at all has no shares.
            found["quality"] = (self.loss - budget.quality) / max(budget.quality, 1e-3)
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.plan.name, "kind": self.plan.kind, "passes": self.plan.recipe, "predicted": self.plan.predicted,
            "loss": None if self.failed else self.loss, "standard_error": self.error, "weights_bytes": self.nbytes,
            "disk_bytes": self.disk_bytes, "latency": self.latencies, "failed": self.failed,
        }  # fmt: skip


class Trials:
    """Compiles and measures plans, at most `most`, each once. done: those so far.

    Quality is measured with every layer in its compressed form (`keep_compressed`), so that it does not depend on which form
    was faster when it was loaded.
    """

    def __init__(
        self, captured: Captured, options: Options, samples: Samples, evaluation: Evaluation, most: int, *,
        until: float = math.inf, original: Contender | None = None, sizes: Sequence[Size] = (), folder: Path | None = None,
        say: Say = unsaid,
    ) -> None:  # fmt: skip
        """options: as the recipe will be compiled with, but its passes; samples: what `options.calib` is; until: of
        `time.monotonic`, no trial begins that would end later if it took as long as the longest so far, but for the first;
        original: what latencies are shares of, at `sizes`; None: latency is not measured; folder: in which artifacts are
        written to be weighed, and removed."""
        self.captured, self.options, self.samples = captured, options, samples
        self.evaluation, self.most, self.until = evaluation, most, until
        self.original, self.sizes, self.folder, self.say = original, sizes, folder, say
        self.done: list[Trial] = []
        self.seconds: dict[str, float] = {}
        """Of the original, as it was measured last."""
        self._began, self._longest = time.monotonic(), 0.0
        plain = compile_captured(captured, replace(options, passes=(), calib=None))
        self.quality: Quality = evaluation.measure(plain)
        self.overhead = self._weighed(plain) - plain.program.nbytes()
        """Bytes on disk beyond those of constants, the most that was seen."""
        self.plain = self._timed(plain, 0) if original else {}
        """Latencies of the model as fxc runs it with nothing done to it, shares of the original's."""

    @property
    def left(self) -> int:
        """How many may still be made, at most."""
        by_number = self.most - len(self.done)
        return by_number if self.in_time else 0

    @property
    def in_time(self) -> bool:
        """Whether another ends in time, by the longest so far; the first is made in any case."""
        return not self.done or time.monotonic() + self._longest <= self.until

    @property
    def ended_by(self) -> str | None:
        """Why there are none left, in words."""
        if not self.in_time:
            return "the time is up (--minutes)"
        return None if self.left else f"{self.most} trials were made (--trials)"

    def run(self, plan: Plan) -> tuple[Trial, CompiledModel | None]:
        """Raises nothing that gates do: such a plan has failed, and the trial says why."""
        began = time.monotonic()
        spent = (began - self._began) / max(len(self.done), 1)
        left = f", at most {in_words(min(spent * self.left, self.until - began))}" if self.done else ""
        self.say(f"trial {len(self.done) + 1} of at most {self.most}{left}: {plan.kind}, {plan.name}")
        trial, model = self.measured(plan)
        self._longest = max(self._longest, time.monotonic() - began)
        self.done.append(trial)
        return trial, model

    def measured(self, plan: Plan) -> tuple[Trial, CompiledModel | None]:
        """`run`, of which nobody is told and which does not count."""
        began = time.monotonic()
        try:
            model = compile_captured(
                self.captured, replace(self.options, passes=plan.passes), read={"calib": self.samples}
            )
            packed = compiled_model(
                model.program, model.record, config=model.config, device=self.options.device, backend=self.options.backend,
                keep_compressed=True,
            )  # fmt: skip
            loss, error = self.evaluation.measure(packed).loss_against(self.quality)
        except (VerificationFailed, UsageError) as error:
            return Trial(plan, failed=f"{error.where}: {error.what}" if error.where else error.what), None
        disk = self._weighed(model)
        self.overhead = max(self.overhead, disk - model.program.nbytes())
        latencies = self._timed(model, disk) if self.original else {}
        return Trial(plan, loss, error, model.program.nbytes(), disk, latencies, time.monotonic() - began), model

    def _weighed(self, model: CompiledModel) -> int:
        with tempfile.TemporaryDirectory(prefix=".fxc-search-", dir=self.folder) as folder:
            model.save(Path(folder) / "model")
            return on_disk(Path(folder) / "model")

    def _timed(self, model: CompiledModel, disk: int) -> dict[str, float]:
        """In turns with the original, so that what else the machine does hits both."""
        baseline, ours = timed([self.original, compiled("", model, disk)], self.sizes, device=self.options.device)
        self.seconds = {f"{b.size} {b.phase}": b.median / 1e3 for b in baseline}
        return {f"{b.size} {b.phase}": each.share_of(b) for b, each in zip(baseline, ours, strict=True)}
