"""Weights that several processes pack in turns, for a model that is larger than memory. The first one writes what all make.

Every process goes through the same layers. Each packs and judges the weights whose turn is its own, and sends the parts to the
first one, which puts them where it would put its own: the files are those of a single process, and a run that was killed goes
on in any number of processes. The others keep of packed weights no more than their shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, fx

from fxc import ranks
from fxc.errors import FxcError, UsageError
from fxc.ir.program import Program
from fxc.ir.store import Constants
from fxc.passes.base import Pass
from fxc.schemes.scheme import scheme_of


class Turns:
    """Of one pass over `program`. is_first: whether this process writes; are_shared: whether there are others."""

    def __init__(self, program: Program, layers: Collection[fx.Node], of: Pass) -> None:
        self.constants = program.constants
        self.are_shared = isinstance(self.constants, Constants) and ranks.count() > 1
        self.is_first = not self.are_shared or ranks.number() == 0
        self._at: int | None = None
        if self.are_shared and any(scheme_of(layer.target) for layer in layers):
            raise UsageError(
                f"{of} packs what another pass of this run has packed, which several processes do not share",
                where=of.name, hint="run it in one process",
            )  # fmt: skip

    def next(self) -> int:
        """The number of the process that packs the next weight. What an earlier run has saved is the first one's."""
        if not self.are_shared:
            return 0
        if self._at is None:
            if ranks.agreed(self.is_first and self.constants.has_saved()):
                return 0
            self._at = -1
        self._at += 1
        return self._at % ranks.count()

    def send(self, parts: dict[str, Tensor], error: float) -> None:
        """Give the first process what this one made of a weight, and how large the error of the layer is."""
        ranks.send([error, {part: (each.dtype, each.shape) for part, each in parts.items()}], list(parts.values()), 0)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around what this process does in its turn: the first one is told why it fails."""
        try:
            yield
        except FxcError as error:
            if not self.is_first:
                ranks.send([error, {}], [], 0)
            raise

    def receive(self, number: int) -> tuple[dict[str, Tensor], float]:
        """What the process `number` made of a weight. Raises what it raised."""
        (error, types), tensors = ranks.receive(number, lambda said: list(said[1].values()))
        if isinstance(error, FxcError):
            raise error
        return dict(zip(types, tensors, strict=True)), error
