"""What each pass of a compilation was worth: size, latency and perplexity of the program after it, measured side by side."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from fxc.captured import Captured
from fxc.ir.program import Program
from fxc.measure import evaluate as quality
from fxc.measure.bench import Contender, race
from fxc.pipeline import Step
from fxc.report.console import Output
from fxc.runtime.model import compiled_model

_TOO_SLOW = 2.0  # seconds of one call, above which timing every pass would take minutes
_LENGTH, _NEW, _ROUNDS = 64, 8, 5


@dataclass
class Stages:
    """The programs between passes; those of passes that changed nothing are left out."""

    captured: Captured
    programs: list[tuple[str, Program, bool]] = field(default_factory=list)

    def add(self, step: Step, program: Program, is_policy: bool) -> None:
        if step.changed:
            self.programs.append((step.name, program.copy(), is_policy))

    def measure(
        self, tokens: torch.Tensor | None, device: str | None, output: Output, timed: bool = True
    ) -> list[dict[str, Any]]:
        """One row for the model as captured and for each program, with bytes, parameters, if `timed` milliseconds (median; by
        phase) where one call is not too slow, and with `tokens` [T] the perplexity. A pass that may not change what the program
        computes keeps the perplexity of the one before."""
        named = [("as captured", self.captured.program, True), *self.programs]
        entries = []
        for name, program, _ in named:
            # Which form of a layer is faster is found by timing it.
            model = compiled_model(
                program, {}, config=self.captured.config, files=self.captured.files, device=device, keep_compressed=not timed
            )
            entries.append(Contender(name, "fxc eager", model, program, program.nbytes()))
        rows = [{"name": name, "bytes": p.nbytes(), "parameters": p.numel()} for name, p, _ in named]
        if timed:
            self._time(rows, entries, device, output)
        if tokens is not None:
            before = None
            for row, entry, (name, _, is_policy) in zip(rows, entries, named, strict=True):
                if before is None or is_policy:
                    before = quality.perplexity(
                        entry.model, tokens, track=lambda items, name=name: output.track(items, f"perplexity {name}")
                    )
                row["perplexity"] = before
        return rows

    def _time(self, rows: list[dict[str, Any]], entries: list[Contender], device: str | None, output: Output) -> None:
        with output.doing("timing the model after each pass"):
            spent = _one_call(entries[0], device)
            if spent > _TOO_SLOW:
                output.note(f"one call takes {spent:.1f} s: the passes are not timed; 'fxc bench model' times the result")
                return
            longest = getattr(self.captured.config, "max_position_embeddings", None) or _LENGTH + _NEW
            length = max(1, min(_LENGTH, longest - _NEW))
            for row, raced in zip(rows, race(entries, [1], [length], new=_NEW, rounds=_ROUNDS, device=device)):
                row["milliseconds"] = {phase: statistics.median(ms) for phase, ms in raced.milliseconds.items()}
                row["tokens"] = length if raced.seq else None


def _one_call(entry: Contender, device: str | None) -> float:
    began = time.perf_counter()
    race([entry], [1], [1], new=1, rounds=1, device=device)
    return (time.perf_counter() - began) / 5
