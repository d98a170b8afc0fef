"""What a search found, and the files that it is written to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError
from fxc.measure.quality import Quality
from fxc.selection.budget import Budget
from fxc.selection.groups import Space
from fxc.selection.knapsack import Costs
from fxc.selection.trials import Trial

AGREES = 0.8
"""The rank correlation of predicted and measured losses below which the prediction is said to be of little use."""


@dataclass
class Found:
    """What a search found.

    model: the best that fits, as `fxc compile --recipe` makes it; recipe: the text of that file; best: its trial; trials: all
    that were measured, in order; correlation: the rank correlation of predicted and measured losses, None of fewer than three;
    quality: of the original; left: layers that stay float in every format, and why; unmeasured: uniform choices that were
    predicted to be hopeless; untried: what would have been measured as well, had trials and time sufficed, and ended_by which
    of these did not, in words, None where all was tried.
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
    untried: list[str] = field(default_factory=list)
    ended_by: str | None = None

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
            "unmeasured": self.unmeasured, "untried": self.untried, "ended_by": self.ended_by, "groups": groups,
            "left_float": self.space.left,
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
