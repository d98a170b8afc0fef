"""Part of the range of activations moves into the weights that read them, so that both are quantized well.

    constant @up.weight: f32[16, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 8] = aten.rms_norm(%0, [8])  # norm
    %2: f32[s0, 16] = aten.linear(%1, @up.weight)  # up
    return "out" %2
    ---
    constant @norm.weight: f32[8]
    constant @up.weight: f32[16, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 8] = aten.rms_norm(%0, [8], @norm.weight)  # norm
    %2: f32[s0, 16] = aten.linear(%1, @up.weight)  # up
    return "out" %2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxc.analysis.channels import Reach
from fxc.calibrate.hessian import Squares
from fxc.calibrate.smooth import smooth
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Result
from fxc.passes.facts import SMOOTH
from fxc.passes.scales import MoveScales, by_channel, matrices


@dataclass(frozen=True)
class Smooth(MoveScales):
    """Divide each channel of what linear layers read by s = max|x|^alpha / max|w|^(1-alpha), and multiply the weights that read
    it (SmoothQuant, arXiv 2211.10438). The division goes into the norm or linear layer that the channel comes from, through
    attention, relu and products of two values; where a residual sum reads what a norm gives too, into a product of its own
    behind the norm. Before int8, so that large channels of activations cost the others less; static int8 adds it by itself.

    alpha: from 0, all of the range stays in the activations, to 1, all of it goes into the weights.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "smooth"
    gives: ClassVar[frozenset[Fact]] = frozenset({SMOOTH})
    apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha} is not from 0 to 1", where="smooth", hint="0.5 is usual")

    def run(self, program: Program, context: Context) -> Result:
        result = super().run(program, context)
        program.metadata["smooth"] = True
        return result

    def scale(self, program: Program, context: Context, found: Reach, read: dict[fx.Node, Squares]) -> Tensor | str:
        largest = by_channel(found, {reader: read[reader].largest for reader in found.readers})
        reads = {r: torch.stack([m.abs().amax(0) for m in matrices(program, r)]).amax(0) for r in found.readers}
        return smooth([by_channel(found, reads)[None]], largest, self.alpha)
