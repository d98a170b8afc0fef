"""What each choice is predicted to cost, as a sum over groups, and how far that agrees with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxc.captured import Captured
from fxc.compiler import samples_of
from fxc.data.calibration import held_out
from fxc.data.labels import Samples
from fxc.errors import UsageError
from fxc.measure.contenders import Size
from fxc.options import Options
from fxc.progress import Track, untracked
from fxc.selection.errors import errors_of, group_errors
from fxc.selection.formats import Format
from fxc.selection.groups import Space, space_of
from fxc.selection.influence import SIZE, influence
from fxc.selection.knapsack import Costs
from fxc.selection.times import rows_of, times_of
from fxc.selection.trials import Trial


@dataclass(frozen=True)
class Predictions:
    """What is known before anything is compiled, whatever the budget. space: what there is to choose from; samples: what
    `options.calib` is; costs: of each group, format's number -> what it is predicted to cost."""

    space: Space
    samples: Samples
    costs: list[Mapping[int, Costs]]

    def with_times(
        self, captured: Captured, options: Options, sizes: Sequence[Size], original: Mapping[str, float],
        track: Track = untracked,
    ) -> Predictions:  # fmt: skip
        """original: seconds of the original by phase, of which what a group takes is a share."""
        times = times_of(self.space, rows_of(captured.program, sizes), options.device, options.backend, track)
        costs = [_with_times(each, known, original) for each, known in zip(self.costs, times, strict=True)]
        return Predictions(self.space, self.samples, costs)


def predictions_of(
    captured: Captured, options: Options, formats: Sequence[Format], track: Track = untracked
) -> Predictions:
    """From one pass over the calibration data and a few runs with noise. Raises `UsageError` where nothing is to be chosen."""
    space = space_of(captured.program, formats, options.skip)
    if not space.groups:
        why = "; ".join(f"{layer}: {reason}" for layer, reason in list(space.left.items())[:3]) or "it has no layers"
        raise UsageError("no format takes any layer of the model", why=why, hint="--formats")
    samples = samples_of(captured, options, track)
    learned, _ = held_out(samples)
    errors = errors_of(space, learned, SIZE, options.seed, track)
    weights = influence(space.base, errors, learned, options.seed, track)
    costs: list[Mapping[int, Costs]] = []
    for group, nbytes in zip(space.groups, space.sizes, strict=True):
        known = {0: 0.0} | group_errors(group, errors, weights)
        costs.append({n: {"size": float(nbytes[n]), "loss": max(known[n], 0.0)} for n in nbytes})
    return Predictions(space, samples, costs)


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


def undominated(options: Mapping[int, Costs]) -> dict[int, Costs]:
    """Without those that another is as good as in everything; of equals the first stays."""
    kept: dict[int, Costs] = {}
    for number, costs in options.items():
        others = [each for n, each in options.items() if n != number]
        if not any(
            all(each[k] <= costs[k] for k in costs) and (each != costs or each in kept.values()) for each in others
        ):
            kept[number] = costs
    return kept


def predicted(trials: Sequence[Trial]) -> list[Trial]:
    """Those that something was predicted of, and that could be compiled."""
    return [t for t in trials if t.failed is None and t.plan.predicted is not None]


def scale(trials: Sequence[Trial]) -> float:
    """What is measured for each unit of what is predicted: least squares over the trials."""
    pairs = [(t.plan.predicted, t.loss) for t in predicted(trials) if t.plan.predicted > 0 and t.loss > 0]
    if not pairs:
        return 1.0
    return sum(p * m for p, m in pairs) / sum(p * p for p, _ in pairs)


def correlation(trials: Sequence[Trial]) -> float | None:
    """Of the ranks of predicted and measured losses, where what lies within a standard error of each other is a tie; None of
    fewer than three."""
    from scipy.stats import spearmanr

    known = predicted(trials)
    errors = sorted(t.error for t in known if t.error)
    step = errors[len(errors) // 2] if errors else 0.0
    pairs = [(scale(trials) * t.plan.predicted, t.loss) for t in known]
    if step:
        pairs = [(round(foreseen / step), round(loss / step)) for foreseen, loss in pairs]
    if len(pairs) < 3 or min(len(set(each)) for each in zip(*pairs)) < 2:
        return None
    return float(spearmanr(*zip(*pairs)).statistic)
