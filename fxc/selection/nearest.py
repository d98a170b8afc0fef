"""Where nothing meets the budget: what is nearest, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

from fxc.errors import VerificationFailed
from fxc.selection.budget import Budget
from fxc.selection.trials import Trial


def nearest(trials: Sequence[Trial], budget: Budget, original_bytes: int) -> Trial | None:
    """None where nothing could be compiled."""
    known = [each for each in trials if each.failed is None]
    return min(known, key=lambda t: max(t.misses(budget, original_bytes).values(), default=0), default=None)


def missed(
    trials: Sequence[Trial], budget: Budget, original_bytes: int, ended_by: str | None = None
) -> VerificationFailed:
    """The error for trials none of which meets the budget. ended_by: why there were no more, where there was more to try."""
    closest, known = nearest(trials, budget, original_bytes), [each for each in trials if each.failed is None]
    if closest is None:
        failed = trials[0].failed if trials else "no trial was made"
        return VerificationFailed("nothing that was tried could be compiled", why=failed, hint="--formats, --skip")
    lacks = ", ".join(
        _lacking(closest, name, budget, original_bytes) for name in closest.misses(budget, original_bytes)
    )
    return VerificationFailed(
        f"nothing that was measured meets {budget}",
        why=f"the nearest of {len(known)} is {closest.plan.name}; it has {lacks}"
        + (f"; more was not tried, because {ended_by}" if ended_by else ""),
        hint="a larger budget for that, more --trials or --minutes, or other --formats; nothing was written",
    )


def _lacking(trial: Trial, name: str, budget: Budget, original: int) -> str:
    if name == "size":
        return f"a size of {size_text(trial.disk_bytes, original)} and not {size_text(budget.most_bytes(original), original)}"
    if name == "latency":
        where = max(trial.latencies, key=trial.latencies.__getitem__)
        return f"a latency of {trial.slowest:.3f}x at {where} and not {budget.latency:g}x"
    return f"a loss of {trial.loss:.2%} and not {budget.quality:.2%}"


def size_text(nbytes: float, original: int) -> str:
    return f"{nbytes / 1e6:.2f} MB ({nbytes / original:.3f}x)"
