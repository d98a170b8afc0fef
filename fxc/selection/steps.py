"""The steps of a search: what is measured, and in which order.

The best by prediction; uniform choices that may be better; the next best by prediction; exchanges of a format or two of the
best; then what no prediction knows: another algorithm, and pruning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxc.captured import Captured
from fxc.compiled.model import CompiledModel
from fxc.errors import VerificationFailed
from fxc.options import Options
from fxc.passes.base import parse_passes
from fxc.passes.prune.amount import most_within
from fxc.recipe import recipe_text
from fxc.selection.budget import Budget
from fxc.selection.exchange import neighbour
from fxc.selection.formats import recipe_of
from fxc.selection.found import Found
from fxc.selection.knapsack import solve, total
from fxc.selection.nearest import missed, nearest, size_text
from fxc.selection.prediction import Predictions, correlation, predicted, scale, undominated
from fxc.selection.trials import Plan, Trial, Trials

AMOUNTS = tuple(f"prune:budget={share}:round_to=32" for share in (0.01, 0.02, 0.05, 0.1))
"""Pruning as far as costs so much of the loss, in channels that groups of 32 divide. Within a budget of quality the most that
keeps it is looked for, else the second and the last are tried, ..."""
LAYERS = "prune:layers=0.2"
"""... and a fifth of the layers."""
_BEST = 3
"""So many of the best by prediction are measured, ..."""
_HOPELESS = 2.0
"""... and of uniform choices those whose predicted loss is not more than so many times what is needed."""
_AT_LEAST = 3
_PATIENCE = 4
_ADJUSTMENTS = 5


class Steps:
    def __init__(
        self, captured: Captured, options: Options, budget: Budget, predictions: Predictions, trials: Trials
    ) -> None:
        self.captured, self.options, self.budget, self.trials = captured, options, budget, trials
        self.space, self.predictions = predictions.space, predictions.costs
        self._worthwhile = [undominated(each) for each in self.predictions]
        self.most_bytes = budget.most_bytes(captured.nbytes)
        self.best: tuple[Trial, CompiledModel] | None = None
        self.unmeasured: list[str] = []
        self.untried: list[str] = []
        # Trials for what no prediction knows, which comes last.
        self._kept = min(1 + (len(AMOUNTS) if budget.is_timed else 0), trials.most // 3)
        self._tried: dict[tuple[int, ...], Trial] = {}

    def run(self) -> Found:
        self._check_possible()
        self._first()
        self._uniform()
        self._next_best()
        self._exchange()
        self._other_algorithm()
        self._pruned()
        if self.best is None:
            raise missed(self.trials.done, self.budget, self.captured.nbytes, self._ended_by)
        trial, model = self.best
        options = self.options
        recipe = recipe_text(trial.plan.recipe, options.skip, options.dtype, _amounts(options))
        return Found(
            model, recipe, trial, self.trials.done, self.budget, self.trials.quality, self.captured.nbytes,
            correlation(self.trials.done), self.space, self.predictions, self.unmeasured, self.untried, self._ended_by,
        )  # fmt: skip

    @property
    def _ended_by(self) -> str | None:
        return self.trials.ended_by or "the last trials were kept for what no prediction knows" if self.untried else None

    # What is predicted

    @property
    def scale(self) -> float:
        """What is measured for each unit of what is predicted."""
        return scale(self.trials.done)

    def _loss(self, choice: Sequence[int]) -> float:
        return total(self.predictions, choice, "loss")

    def _bytes(self, choice: Sequence[int]) -> int:
        """On disk."""
        return self.space.nbytes(choice) + self.trials.overhead

    def _solved(self, loss: float = math.inf, unlike: Sequence[Sequence[int]] = (), differing: int = 1) -> list[int] | None:
        """The best choice by prediction. loss: at most so much."""
        limits = {"size": self.most_bytes - self.space.fixed - self.trials.overhead, "loss": loss}
        if self.budget.latency is not None:
            limits |= {phase: self.budget.latency - share - self._slower(phase) for phase, share in self.trials.plain.items()}
        return solve(self._worthwhile, self._minimised, limits, unlike, differing)

    def _slower(self, phase: str) -> float:
        """By how much, in shares of the original's latency, what was measured was slower than predicted, in the mean."""
        off = [
            t.latencies[phase] - self.trials.plain[phase] - total(self.predictions, t.plan.choice, phase)
            for t in predicted(self.trials.done) if t.plan.choice is not None
        ]  # fmt: skip
        return sum(off) / len(off) if off else 0.0

    @property
    def _minimised(self) -> str:
        return "loss" if self.budget.optimised == "quality" else self.budget.optimised

    @property
    def _most_loss(self) -> float:
        """That prediction may say, by what was measured so far."""
        return math.inf if self.budget.quality is None else self.budget.quality / self.scale

    # What is measured

    def _measure(self, choice: Sequence[int], kind: str, name: str | None = None) -> Trial | None:
        """The trial of a choice, None where no more are left."""
        at = tuple(choice)
        if at in self._tried:
            return self._tried[at]
        if self.trials.left <= self._kept:
            self.untried.append(f"{kind}: {name or self._named(at)}")
            return None
        plan = Plan(self._passes(at), name or self._named(at), kind, at, self._loss(at))
        self._tried[at] = trial = self._run(plan)
        return trial

    def _is_left(self, what: str) -> bool:
        """Whether there is a trial for it; where not, that is noted."""
        if not self.trials.left:
            self.untried.append(what)
        return self.trials.left > 0

    def _run(self, plan: Plan) -> Trial:
        trial, model = self.trials.run(plan)
        if model is not None and not trial.misses(self.budget, self.captured.nbytes) and (
            self.best is None or trial.value(self.budget.optimised) < self.best[0].value(self.budget.optimised)
        ):
            self.best = trial, model
        return trial

    def _passes(self, choice: Sequence[int]) -> tuple[Any, ...]:
        layers = [
            [name for at, group in enumerate(self.space.groups) if choice[at] == number for name in group.layers]
            for number in range(len(self.space.formats))
        ]
        tables = frozenset().union(*(group.tables for group in self.space.groups))
        return tuple(recipe_of(self.space.formats[1:], layers[1:], tables, layers[0], list(self.space.left)))

    def _named(self, choice: Sequence[int]) -> str:
        count = {n: choice.count(n) for n in sorted(set(choice))}
        return "; ".join(f"{self.space.formats[n]} in {c} of {len(choice)} groups" for n, c in count.items())

    # The steps

    def _check_possible(self) -> None:
        """Raises `VerificationFailed` where the smallest choice is too large."""
        smallest = [min(sizes, key=sizes.__getitem__) for sizes in self.space.sizes]
        if (least := self._bytes(smallest)) > self.most_bytes:
            raise VerificationFailed(
                f"nothing is as small as {self.budget} asks", where="size",
                why=f"the smallest is {size_text(least, self.captured.nbytes)}: {self._named(smallest)}; "
                f"at most {size_text(self.most_bytes, self.captured.nbytes)} is asked for",
                hint="a larger size, formats of fewer bits (--formats), or prune the model first",
            )  # fmt: skip

    def _first(self) -> None:
        """The best by prediction, and of a budget of quality where on the scale of predictions it lies."""
        limit = self._most_loss
        for _ in range(_ADJUSTMENTS):
            choice = self._solved(limit)
            if choice is None or tuple(choice) in self._tried:
                break
            trial = self._measure(choice, "predicted")
            if trial is None or trial.failed is not None:
                break
            missed = trial.misses(self.budget, self.captured.nbytes)
            if "size" in missed:
                continue  # how much there is on disk besides constants is known better now
            if self.budget.quality is None or trial.loss <= 0:
                break
            # At most by half or twice as much, for one measurement is not all.
            limit = trial.plan.predicted * min(max(self.budget.quality / trial.loss, 0.5), 2.0)

    def _uniform(self) -> None:
        """Every choice of one format for all layers, and one for tables, that may be better than the best so far."""
        groups = self.space.groups
        tables = [at for at, group in enumerate(groups) if group.tables]
        numbers = range(len(self.space.formats))
        found: dict[tuple[int, ...], str] = {}
        int8 = [n for n in numbers if str(self.space.formats[n]).startswith("int8")][:1]
        for form, table in ((f, t) for f in numbers for t in (dict.fromkeys([0, f, *int8]) if tables else [0])):
            choice = [
                wanted if (wanted := table if at in tables else form) in sizes else 0
                for at, sizes in enumerate(self.space.sizes)
            ]
            named = f"{self.space.formats[form]}" + (f", tables {self.space.formats[table]}" if tables else "")
            found.setdefault(tuple(choice), named)
        fitting = [each for each in found if self._bytes(each) <= self.most_bytes and each not in self._tried]
        measured = 0
        for choice in sorted(fitting, key=lambda each: (self._loss(each), self._bytes(each))):
            # A few are measured in any case, so that what is predicted is seen to hold for more than the best.
            if self._is_larger(choice) or (measured >= _AT_LEAST and self._is_hopeless(choice)):
                self.unmeasured.append(found[choice])
                continue
            measured += 1
            self._measure(choice, "uniform", found[choice])

    def _is_larger(self, choice: tuple[int, ...]) -> bool:
        """Whether it cannot be the smallest."""
        return self.budget.optimised == "size" and self.best is not None and self.space.nbytes(choice) > self.best[0].nbytes

    def _is_hopeless(self, choice: tuple[int, ...]) -> bool:
        """Whether it was predicted to lose far too much."""
        needed = self._most_loss
        if self.budget.optimised == "quality" and self.best:
            needed = min(needed, max(self.best[0].loss / self.scale, self.best[0].plan.predicted or 0.0))
        return self._loss(choice) > _HOPELESS * needed

    def _next_best(self) -> None:
        differing = max(1, len(self.space.groups) // 10)
        known: list[list[int]] = []
        for _ in range(_BEST):
            choice = self._solved(self._most_loss, known, differing)
            if choice is None or self._measure(choice, "predicted") is None:
                return
            known.append(choice)

    def _exchange(self) -> None:
        """Exchange formats of one group or two of the best, for as long as that is better than it was."""
        fails = 0
        while self.best and self.best[0].plan.choice and fails < _PATIENCE:
            before = self.best[0]
            choice = self._neighbour(before)
            if choice is None or self._measure(choice, "swapped") is None:
                return
            fails = 0 if self.best[0] is not before else fails + 1

    def _neighbour(self, of: Trial) -> tuple[int, ...] | None:
        """The untried choice that differs from that of a trial in one group or two, keeps within the budgets by what is known,
        and is the best by prediction."""
        room = {"size": self.most_bytes - of.disk_bytes}
        if self.budget.quality is not None:
            room["loss"] = (self.budget.quality - of.loss) / self.scale
        if self.budget.latency is not None:
            room |= {phase: self.budget.latency - share for phase, share in of.latencies.items()}
        room = {name: left for name, left in room.items() if left != math.inf}
        return neighbour(of.plan.choice, self._worthwhile, self.predictions, self._minimised, room, self._tried)

    def _other_algorithm(self) -> None:
        """gptq makes up for its own rounding, qronos for that of the layers before as well, which no prediction knows."""
        if not self.best:
            return
        plan = self.best[0].plan
        passes = tuple(
            replace(each, algorithm="qronos") if getattr(each, "algorithm", None) == "gptq" else each for each in plan.passes
        )
        if passes != plan.passes and self._is_left("qronos in place of gptq"):
            self._run(replace(plan, passes=passes, name=f"{plan.name}; by qronos", kind="qronos", predicted=None))

    def _pruned(self) -> None:
        """Heads, channels and layers less, in front of the best or of what is nearest, where latency counts or nothing fits
        yet: what that costs does not add up, and is measured. Without training, fewer bits save the same bytes for less."""
        if self.best and not self.budget.is_timed:
            return
        front = self.best[0] if self.best else nearest(self.trials.done, self.budget, self.captured.nbytes)
        if front is None:
            return
        plan = front.plan

        def keeps_quality(step: int) -> bool:
            trial = self._pruned_by(AMOUNTS[step - 1], plan)
            return trial is not None and trial.failed is None and trial.loss <= self.budget.quality

        if self.budget.quality is not None:
            most_within(len(AMOUNTS), keeps_quality)
        else:
            for text in AMOUNTS[1::2]:
                self._pruned_by(text, plan)
        self._pruned_by(LAYERS, plan)

    def _pruned_by(self, text: str, plan: Plan) -> Trial | None:
        """None where no trial is left."""
        if not self._is_left(text):
            return None
        passes = (*parse_passes(text), *plan.passes)
        return self._run(replace(plan, passes=passes, name=f"{text}; {plan.name}", kind="pruned", predicted=None))


def _amounts(options: Options) -> dict[str, int]:
    """What of the data is read, where that is not as usual."""
    usual = Options("")
    given = {name: getattr(options, name) for name in ("calib_samples", "calib_length")}
    return {name: value for name, value in given.items() if value != getattr(usual, name)}
