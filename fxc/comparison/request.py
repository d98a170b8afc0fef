"""What a comparison is asked for, and all that can be said of it before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fxc.comparison.strategies import Strategy
from fxc.data.calibration import LIMIT, TRAINING, WINDOW, check_amount, check_data
from fxc.errors import UsageError
from fxc.lower.inductor import require_compiler
from fxc.lower.target import check_target
from fxc.measure.contenders import Size
from fxc.measure.quality import WINDOW as EVALUATED
from fxc.options import Options
from fxc.source.load import kind_of

HELDOUT = "heldout.txt"
"""In a model's folder, what quality is measured on where no data is given."""


@dataclass(frozen=True)
class Request:
    """See `fxc.compare`. options: how every strategy is compiled, but for its passes."""

    model: Any
    example_inputs: Any
    strategies: list[Strategy]
    out: Path
    data: Any
    eval_samples: int | None
    eval_length: int
    sizes: list[Size]
    new: int
    rounds: int
    options: Options

    @property
    def source(self) -> str | None:
        return str(self.model) if isinstance(self.model, (str, Path)) else None

    @property
    def folder(self) -> Path | None:
        """The folder that the model comes from, if it does."""
        local = self.source is not None and kind_of(self.source) in ("folder", "artifact")
        return Path(self.source).expanduser() if local else None

    @property
    def name(self) -> str:
        return type(self.model).__name__ if self.source is None else self.source

    @property
    def backend(self) -> str:
        return self.options.backend or "eager"

    @property
    def found(self) -> Path | None:
        """What quality is measured on because it lies beside the model."""
        there = self.data is None and self.folder is not None and (self.folder / HELDOUT).is_file()
        return self.folder / HELDOUT if there else None

    def checked(self) -> Request:
        """The same with data that can be read more than once. Raises `UsageError` for what cannot be."""
        for name in ("resume", "dump_dir", "teacher"):
            if getattr(self.options, name) is not None:
                hint = "leave it out, or compile the strategy alone"
                raise UsageError(f"a comparison takes no {name}", where=name, hint=hint)
        check_target(self.options.device, self.options.backend)
        if self.backend in ("inductor", "aoti"):
            require_compiler()
        if min(self.new, self.rounds) < 1:
            raise UsageError(f"{self.rounds} rounds of {self.new} tokens", where="rounds, new", hint="at least 1")
        check_amount(1 if self.eval_samples is None else self.eval_samples, self.eval_length)
        if self.data is not None:
            check_data(self.data, "evaluation")
        elif self.found is None and self.eval_length != EVALUATED:
            raise UsageError("there is no data to take so many tokens of", where="eval_length", hint="--data FILE, data=...")
        self._check_learning("calib", "calibration", LIMIT, any(each.learns for each in self.strategies))
        self._check_learning("train", "training", TRAINING, any(each.trains for each in self.strategies))
        given = {name: getattr(self.options, name) for name in ("calib", "train")}
        kept = {name: _kept(data) for name, data in given.items() if data is not None}
        return replace(self, data=_kept(self.data), options=replace(self.options, **kept))

    def _check_learning(self, name: str, what: str, usual: int, is_read: bool) -> None:
        data = getattr(self.options, name)
        amount = getattr(self.options, f"{name}_samples"), getattr(self.options, f"{name}_length")
        check_amount(*amount)
        hint = f"--{name} FILE, in Python {name}=..."
        if data is None and amount != (usual, WINDOW):
            raise UsageError(f"there is no {what} data to take so many samples or tokens of", where=name, hint=hint)
        if data is not None:
            check_data(data, what)
            if not is_read:
                hint = "leave it out, or add a strategy that learns: 'fxc passes' says which do"
                raise UsageError(f"none of the strategies reads {what} data", where=name, hint=hint)


def _kept(data: Any) -> Any:
    """`data` as what can be gone through again."""
    return data if data is None or isinstance(data, (str, Path, Tensor, Mapping)) else list(data)
