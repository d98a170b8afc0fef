"""fxc search: which compression for which layers, under budgets, predicted and then measured.

Each layer's error in each format comes from one calibration pass (`errors`), how much it matters from a few runs with noise
(`influence`), and the sum over layers is the predicted loss. An integer program chooses (`knapsack`), and what it chooses is
compiled and measured (`trials`) beside every uniform choice that fits and might be better; then formats of a group or two are
exchanged for as long as that is measured to be better. What was measured decides, and what was predicted stands beside it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from fxc.captured import Captured, capture_source, part_of
from fxc.compiled.model import CompiledModel
from fxc.compiler import samples_of
from fxc.data.calibration import held_out
from fxc.errors import UsageError, VerificationFailed
from fxc.measure.bench import Entry
from fxc.measure.contenders import Contender, Size, artifact, compiled, original_contender, sizes_for, sizes_of
from fxc.measure.quality import Evaluation, Quality, evaluation_of
from fxc.neutral import one_at_a_time
from fxc.options import Keywords, Options
from fxc.passes.base import parse_passes
from fxc.passes.prune.amount import most_within
from fxc.progress import Say, Track, unsaid, untracked
from fxc.recipe import recipe_text
from fxc.selection.budget import Budget, parse_budget
from fxc.selection.errors import errors_of, group_errors
from fxc.selection.formats import Format, parse_formats, recipe_of
from fxc.selection.groups import Space, space_of
from fxc.selection.influence import SIZE, influence
from fxc.selection.knapsack import Costs, solve, total
from fxc.selection.times import rows_of, times_of
from fxc.selection.trials import Plan, Trial, Trials
from fxc.source.load import kind_of

TRIALS = 24
AGREES = 0.8
"""The rank correlation of predicted and measured losses below which the prediction is said to be of little use."""
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
_MOVES = 64


@dataclass
class Found:
    """What a search found.

    model: the best that fits, as `fxc compile --recipe` makes it; recipe: the text of that file; best: its trial; trials: all
    that were measured, in order; correlation: the rank correlation of predicted and measured losses, None of fewer than three;
    quality: of the original; left: layers that stay float in every format, and why; unmeasured: uniform choices that were
    predicted to be hopeless.
    """

    model: CompiledModel
    recipe: str
    best: Trial
    trials: list[Trial]
    budget: Budget
    quality: Quality
    original_bytes: int
    correlation: float | None
    space: Space
    predictions: list[Mapping[int, Costs]] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def save(self, out: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the artifact `out` and beside it the recipe, `out`.toml, and all that was predicted and measured,
        `out`.search.json: the paths of these two. Raises what `CompiledModel.save` raises, and `UsageError` where such a file
        is there and `overwrite` is not set."""
        beside = files_beside(out)
        check_free(beside, overwrite)
        self.model.save(out, overwrite=overwrite, source=self.model.source)
        beside[0].write_text(self.recipe, encoding="utf-8")
        beside[1].write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return beside

    def as_json(self) -> dict[str, Any]:
        forms = self.space.formats
        groups = [
            {"layers": group.layers, "format": str(forms[number]) if (number := self._chosen(at)) is not None else None,
             "options": {str(forms[n]): dict(costs) for n, costs in self.predictions[at].items()}}
            for at, group in enumerate(self.space.groups)
        ]  # fmt: skip
        return {
            "budget": str(self.budget), "optimised": self.budget.optimised, "original_bytes": self.original_bytes,
            "original_quality": self.quality.as_json(), "recipe": self.recipe, "best": self.best.as_json(),
            "rank_correlation": self.correlation, "trials": [each.as_json() for each in self.trials],
            "unmeasured": self.unmeasured, "groups": groups, "left_float": self.space.left,
        }  # fmt: skip

    def _chosen(self, at: int) -> int | None:
        return None if self.best.plan.choice is None else self.best.plan.choice[at]


def files_beside(out: str | Path) -> list[Path]:
    """The recipe and the record of a search, beside its artifact."""
    path = Path(out)
    return [path.with_name(f"{path.name}{suffix}") for suffix in (".toml", ".search.json")]


def check_free(files: Iterable[Path], overwrite: bool) -> None:
    """Raises `UsageError` for a file that is there and would be lost."""
    if not overwrite and (there := [path for path in files if path.exists()]):
        raise UsageError("there is a file already", where=there[0], hint="--overwrite, or another name")


@one_at_a_time
def search(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    budget: str | Budget,
    eval: Any = None,
    eval_samples: int | None = None,
    formats: str | Iterable[str] | None = None,
    sizes: str | Sequence[Size] = (),
    trials: int = TRIALS,
    track: Track = untracked,
    say: Say = unsaid,
    **options: Unpack[Keywords],
) -> Found:
    """The best compression of `model` within `budget`, as "size=0.4x,latency=0.6x,quality=1%" (see `Budget`): of quality, size
    and latency the first that has no budget is made as good as it can be, and quality where all have one.

    model, example_inputs, options: as of `fxc.optimize`; `calib` is what formats learn from, and `seed` is of the noise too.
    eval: data that quality is measured on, as `calib`, with labels where it has some; None: made up. eval_samples: at most so
    many of it. formats: what layers may become, as "int8;int4:group=32:algorithm=gptq" (default:
    `fxc.selection.formats.DEFAULTS`). sizes: "1x128,8x512", where latency has a budget. trials: how many compilations are
    measured at most.

    Raises what `fxc.optimize` raises, and `VerificationFailed` where nothing meets the budget, with what is nearest.
    """
    chosen = checked(Options("", **options))
    wanted = parse_budget(budget) if isinstance(budget, str) else budget
    parse_formats(formats)
    at = sizes_of(sizes) if isinstance(sizes, str) and sizes else list(sizes)
    if at and not wanted.is_timed:
        raise UsageError("latency has no budget, and is not measured", where="sizes", hint="latency=0.6x, or no sizes")
    if trials < 1:
        raise UsageError(f"{trials} trials find nothing", where="trials", hint="8 or more")
    say("capturing the model ...")
    captured = capture_source(model, example_inputs, chosen)
    evaluation = evaluation_of(captured, eval, samples=eval_samples, seed=chosen.seed, track=track)
    original = _original(model, captured, chosen) if wanted.is_timed else None
    return search_of(
        captured, chosen, wanted, evaluation, parse_formats(formats, captured.program), original=original,
        sizes=sizes_for(captured.program, at), trials=trials, track=track, say=say,
    )  # fmt: skip


def _original(model: nn.Module | str | Path, captured: Captured, options: Options) -> Contender:
    """What latencies are shares of: the model as it comes."""
    if isinstance(model, CompiledModel):
        return compiled("original", model, captured.nbytes)
    if isinstance(model, nn.Module):
        module, _ = part_of(model, options.part)
        return Contender(Entry("original", "torch eager", module, captured.program, captured.nbytes), captured.nbytes)
    if kind_of(str(model)) == "artifact":
        return artifact("original", model, backend=options.backend or "eager", device=options.device)
    return original_contender(
        str(model), captured, dtype=str(options.dtype).removeprefix("torch."), device=options.device,
        revision=options.revision, trust_remote_code=options.trust_remote_code, part=options.part,
    )  # fmt: skip


def checked(options: Options) -> Options:
    """Raises `UsageError` for options that no search has."""
    if options.calib is None:
        raise UsageError("formats learn from data", where="calib", hint="--calib FILE, in Python calib=...")
    options.check()
    if not isinstance(options.calib, (str, Path, Tensor, Mapping)):
        return replace(options, calib=list(options.calib))
    return options


def search_of(
    captured: Captured,
    options: Options,
    budget: Budget,
    evaluation: Evaluation,
    formats: Sequence[Format],
    *,
    original: Contender | None = None,
    sizes: Sequence[Size] = (),
    trials: int = TRIALS,
    folder: Path | None = None,
    track: Track = untracked,
    say: Say = unsaid,
) -> Found:
    """`search` of what is captured already. original: what latencies are shares of; folder: where artifacts may be written to
    be weighed."""
    space = space_of(captured.program, formats, options.skip)
    if not space.groups:
        why = "; ".join(f"{layer}: {reason}" for layer, reason in list(space.left.items())[:3]) or "it has no layers"
        raise UsageError("no format takes any layer of the model", why=why, hint="--formats")
    samples = samples_of(captured, options, track)
    learned, _ = held_out(samples)
    errors = errors_of(space, learned, SIZE, options.seed, track)
    weights = influence(space.base, errors, learned, options.seed, track)
    predictions: list[Mapping[int, Costs]] = []
    for group, nbytes in zip(space.groups, space.sizes, strict=True):
        known = {0: 0.0} | group_errors(group, errors, weights)
        predictions.append({n: {"size": float(nbytes[n]), "loss": max(known[n], 0.0)} for n in nbytes})
    measured = Trials(
        captured, options, samples, evaluation, trials, original=original, sizes=sizes, folder=folder, say=say
    )
    if original is not None:
        times = times_of(space, rows_of(captured.program, sizes), options.device, options.backend, track)
        predictions = [_with_times(each, known, measured.seconds) for each, known in zip(predictions, times, strict=True)]
    return _Search(captured, options, budget, space, predictions, measured).run()


def _with_times(
    options: Mapping[int, Costs], times: Mapping[int, Mapping[str, float]], original: Mapping[str, float]
) -> dict[int, Costs]:
    """The options of a group with what they take more than float does, in shares of the original's latency by phase, and as
    "latency" the mean of these."""
    found = {}
    for number, costs in options.items():
        more = {p: (times[number][p] - times[0][p]) / whole if times else 0.0 for p, whole in original.items()}
        found[number] = {**costs, **more, "latency": sum(more.values()) / len(more)}
    return found


class _Search:
    def __init__(
        self, captured: Captured, options: Options, budget: Budget, space: Space, predictions: list[Mapping[int, Costs]],
        trials: Trials,
    ) -> None:  # fmt: skip
        self.captured, self.options, self.budget, self.space = captured, options, budget, space
        self.predictions, self.trials = predictions, trials
        self._worthwhile = [_undominated(each) for each in predictions]
        self.most_bytes = budget.most_bytes(captured.nbytes)
        self.best: tuple[Trial, CompiledModel] | None = None
        self.unmeasured: list[str] = []
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
            raise self._missed()
        trial, model = self.best
        options = self.options
        recipe = recipe_text(trial.plan.recipe, options.skip, options.dtype, _amounts(options))
        return Found(
            model, recipe, trial, self.trials.done, self.budget, self.trials.quality, self.captured.nbytes, self.correlation(),
            self.space, self.predictions, self.unmeasured,
        )  # fmt: skip

    # What is predicted

    @property
    def scale(self) -> float:
        """What is measured for each unit of what is predicted: least squares over the trials."""
        pairs = [(t.plan.predicted, t.loss) for t in self._predicted() if t.plan.predicted > 0 and t.loss > 0]
        if not pairs:
            return 1.0
        return sum(p * m for p, m in pairs) / sum(p * p for p, _ in pairs)

    def correlation(self) -> float | None:
        """Of the ranks of predicted and measured losses, where what lies within a standard error of each other is a tie."""
        from scipy.stats import spearmanr

        known = self._predicted()
        errors = sorted(t.error for t in known if t.error)
        step = errors[len(errors) // 2] if errors else 0.0
        pairs = [(self.scale * t.plan.predicted, t.loss) for t in known]
        if step:
            pairs = [(round(predicted / step), round(loss / step)) for predicted, loss in pairs]
        if len(pairs) < 3 or min(len(set(each)) for each in zip(*pairs)) < 2:
            return None
        return float(spearmanr(*zip(*pairs)).statistic)

    def _predicted(self) -> list[Trial]:
        return [t for t in self.trials.done if t.failed is None and t.plan.predicted is not None]

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
            for t in self._predicted() if t.plan.choice is not None
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
            return None
        plan = Plan(self._passes(at), name or self._named(at), kind, at, self._loss(at))
        self._tried[at] = trial = self._run(plan)
        return trial

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
                why=f"the smallest is {_size(least, self.captured.nbytes)}: {self._named(smallest)}; "
                f"at most {_size(self.most_bytes, self.captured.nbytes)} is asked for",
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
            if self._measure(choice, "uniform", found[choice]) is None:
                self.unmeasured.append(found[choice])

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
        known, aim = of.plan.choice, self._minimised
        room = {"size": self.most_bytes - of.disk_bytes}
        if self.budget.quality is not None:
            room["loss"] = (self.budget.quality - of.loss) / self.scale
        if self.budget.latency is not None:
            room |= {phase: self.budget.latency - share for phase, share in of.latencies.items()}
        room = {name: left for name, left in room.items() if left != math.inf}
        usual = {name: max(sum(max(abs(c[name]) for c in each.values()) for each in self._worthwhile), 1e-30) for name in room}
        moves: list[tuple[int, int, dict[str, float], float]] = []
        for at, options in enumerate(self._worthwhile):
            now = self.predictions[at][known[at]]
            for number, costs in options.items():
                if number != known[at]:
                    more = {name: costs[name] - now[name] for name in {*room, aim}}
                    moves.append((at, number, more, sum(more[name] / usual[name] for name in room)))
        helps = sorted((m for m in moves if m[2][aim] < 0), key=lambda m: m[2][aim] / max(m[3], 1e-9))[:_MOVES]
        pays = sorted((m for m in moves if m[2][aim] >= 0 and m[3] < 0), key=lambda m: m[2][aim] / -m[3])[:_MOVES]
        best: tuple[float, tuple[int, ...]] | None = None
        pairs = ((a, b) for a in helps for b in pays if a[0] != b[0])
        for some in itertools.chain(((m,) for m in helps + pays), pairs):
            value = sum(m[2][aim] for m in some)
            if best is not None and value >= best[0]:
                continue
            if any(sum(m[2][name] for m in some) > left for name, left in room.items()) or (aim == "size" and value >= 0):
                continue
            other = list(known)
            for at, number, *_ in some:
                other[at] = number
            if tuple(other) not in self._tried:
                best = value, tuple(other)
        return None if best is None else best[1]

    def _other_algorithm(self) -> None:
        """gptq makes up for its own rounding, qronos for that of the layers before as well, which no prediction knows."""
        if not self.best or not self.trials.left:
            return
        plan = self.best[0].plan
        passes = tuple(
            replace(each, algorithm="qronos") if getattr(each, "algorithm", None) == "gptq" else each for each in plan.passes
        )
        if passes != plan.passes:
            self._run(replace(plan, passes=passes, name=f"{plan.name}; by qronos", kind="qronos", predicted=None))

    def _pruned(self) -> None:
        """Heads, channels and layers less, in front of the best or of what is nearest, where latency counts or nothing fits
        yet: what that costs does not add up, and is measured. Without training, fewer bits save the same bytes for less."""
        if self.best and not self.budget.is_timed:
            return
        plan = self.best[0].plan if self.best else getattr(self._nearest(), "plan", None)
        if plan is None:
            return

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
        if not self.trials.left:
            return None
        passes = (*parse_passes(text), *plan.passes)
        return self._run(replace(plan, passes=passes, name=f"{text}; {plan.name}", kind="pruned", predicted=None))

    def _nearest(self) -> Trial | None:
        known = [each for each in self.trials.done if each.failed is None]
        return min(known, key=lambda t: max(t.misses(self.budget, self.captured.nbytes).values(), default=0), default=None)

    def _missed(self) -> VerificationFailed:
        nearest, known = self._nearest(), [each for each in self.trials.done if each.failed is None]
        if nearest is None:
            failed = self.trials.done[0].failed if self.trials.done else "no trial was made"
            return VerificationFailed("nothing that was tried could be compiled", why=failed, hint="--formats, --skip")
        missing = ", ".join(_missing(nearest, name, self.budget, self.captured.nbytes)
                            for name in nearest.misses(self.budget, self.captured.nbytes))  # fmt: skip
        return VerificationFailed(
            f"nothing that was measured meets {self.budget}",
            why=f"the nearest of {len(known)} is {nearest.plan.name}; it has {missing}",
            hint="a larger budget for that, more --trials, or other --formats; nothing was written",
        )


def _undominated(options: Mapping[int, Costs]) -> dict[int, Costs]:
    """Without those that another is as good as in everything; of equals the first stays."""
    kept: dict[int, Costs] = {}
    for number, costs in options.items():
        others = [each for n, each in options.items() if n != number]
        if not any(
            all(each[k] <= costs[k] for k in costs) and (each != costs or each in kept.values()) for each in others
        ):
            kept[number] = costs
    return kept


def _missing(trial: Trial, name: str, budget: Budget, original: int) -> str:
    if name == "size":
        return f"a size of {_size(trial.disk_bytes, original)} and not {_size(budget.most_bytes(original), original)}"
    if name == "latency":
        where = max(trial.latencies, key=trial.latencies.__getitem__)
        return f"a latency of {trial.slowest:.3f}x at {where} and not {budget.latency:g}x"
    return f"a loss of {trial.loss:.2%} and not {budget.quality:.2%}"


def _size(nbytes: float, original: int) -> str:
    return f"{nbytes / 1e6:.2f} MB ({nbytes / original:.3f}x)"


def _amounts(options: Options) -> dict[str, int]:
    """What of the data is read, where that is not as usual."""
    usual = Options("")
    given = {name: getattr(options, name) for name in ("calib_samples", "calib_length")}
    return {name: value for name, value in given.items() if value != getattr(usual, name)}
