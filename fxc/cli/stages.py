"""What each pass of a compilation was worth: size, latency and perplexity of the program after it, measured side by side."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from fxc.captured import Captured
from fxc.compilation import PerplexityChange, Stage, Step
from fxc.compiled.model import compiled_model
from fxc.ir.program import Program
from fxc.measure.bench import Entry, race
from fxc.measure.perplexity import Perplexity, perplexity, relative_change
from fxc.report.console import Output
from fxc.schemes.parameters import parameters

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
    ) -> tuple[list[Stage], PerplexityChange | None]:
        """The model as captured and each program: bytes, parameters, if `timed` milliseconds where one call is not too slow,
        and with `tokens` [T] the perplexity, and how that changed from the first to the last. A pass that may not change what
        the program computes keeps the perplexity of the one before."""
        named = [("as captured", self.captured.program, True), *self.programs]
        entries = []
        for name, program, _ in named:
            # Which form of a layer is faster is found by timing it.
            model = compiled_model(
                program, {}, config=self.captured.config, files=self.captured.files, device=device, keep_compressed=not timed
            )
            entries.append(Entry(name, "fxc eager", model, program, program.nbytes()))
        stages = [Stage(name, p.nbytes(), parameters(p)) for name, p, _ in named]
        if timed:
            self._time(stages, entries, device, output)
        if tokens is None:
            return stages, None
        measured: list[Perplexity] = []
        for stage, entry, (name, _, is_policy) in zip(stages, entries, named, strict=True):
            if not measured or is_policy:
                measured.append(
                    perplexity(
                        entry.model, tokens, track=lambda items, what, n, name=name: output.track(items, f"{what} {name}", n)
                    )
                )
            stage.perplexity = measured[-1].value
        before, after = measured[0], measured[-1]
        change, error = relative_change(before, after)
        return stages, PerplexityChange(before.value, after.value, change, error, before.tokens, before.window)

    def _time(self, stages: list[Stage], entries: list[Entry], device: str | None, output: Output) -> None:
        with output.doing("timing the model after each pass"):
            spent = _one_call(entries[0], device)
            if spent > _TOO_SLOW:
                output.note(f"one call takes {spent:.1f} s: the passes are not timed; 'fxc bench model' times the result")
                return
            longest = getattr(self.captured.config, "max_position_embeddings", None) or _LENGTH + _NEW
            length = max(1, min(_LENGTH, longest - _NEW))
            for stage, raced in zip(stages, race(entries, [1], [length], new=_NEW, rounds=_ROUNDS, device=device)):
                stage.milliseconds = {phase: statistics.median(ms) for phase, ms in raced.milliseconds.items()}
                stage.tokens = length if raced.seq else None


def _one_call(entry: Entry, device: str | None) -> float:
    began = time.perf_counter()
    race([entry], [1], [1], new=1, rounds=1, device=device)
    return (time.perf_counter() - began) / 5
