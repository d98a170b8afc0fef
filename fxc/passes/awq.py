"""Weights that meet large activations are scaled up, so that they are quantized more finely, and the activations down.

    constant @up.weight: f32[16, 128]
    %0: f32[s0, 128] = input "x"
    %1: f32[s0, 128] = aten.rms_norm(%0, [128])  # norm
    %2: f32[s0, 16] = aten.linear(%1, @up.weight)  # up
    return "out" %2
    ---
    constant @norm.weight: f32[128]
    constant @up.weight: f32[16, 128]
    %0: f32[s0, 128] = input "x"
    %1: f32[s0, 128] = aten.rms_norm(%0, [128], @norm.weight)  # norm
    %2: f32[s0, 16] = aten.linear(%1, @up.weight)  # up
    return "out" %2
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxc.analysis.channels import Reach
from fxc.calibrate.awq import awq
from fxc.calibrate.hessian import Squares
from fxc.calibrate.levels import BITS, GROUPS, Levels
from fxc.errors import UsageError
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.passes.base import Context
from fxc.passes.linears import PackLinears
from fxc.passes.scales import MoveScales, matrices


@dataclass(frozen=True)
class Awq(MoveScales):
    """Divide each channel of what linear layers read by a scale and multiply the weights that read it, so that rounding these
    weights costs their outputs least (AWQ, arXiv 2306.00978): of 20 powers of mean |x| the best. The division goes into the
    norm or linear layer that the channel comes from. Before int4, which rounds the weights.

    What the weights will be rounded to is what the passes after it say, as int4:bits=3 and int8 do; of layers that read the
    same and are rounded differently, the one with the fewest bits counts. Where none says so it is 4 bits in groups of 128.
    bits, group: otherwise; group=-1 is a whole row, as int8 has it.
    """

    bits: int | Literal["auto"] = "auto"
    group: int | Literal["auto"] = "auto"

    name: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        for option, known in (("bits", BITS), ("group", GROUPS)):
            if getattr(self, option) not in (*known, "auto"):
                what = f"{option}={getattr(self, option)} is not what weights are rounded to"
                raise UsageError(what, where="awq", hint=f"one of {', '.join(map(str, known))}, auto")

    def scale(self, program: Program, context: Context, found: Reach, read: dict[fx.Node, Squares]) -> Tensor | str:
        first, *others = found.readers.values()
        if len(first.unique()) < len(first) or not all(torch.equal(first, other) for other in others):
            return "several of what it reads are one channel, as where heads share values: smooth takes it"
        if why := next((found.blocked[c] for c in first.tolist() if c in found.blocked), None):
            return why
        levels = min((self._levels(program, context, reader) for reader in found.readers), key=lambda each: each.bits)
        if levels.group > 0 and len(first) % levels.group:
            fits = [str(group) for group in GROUPS if group > 0 and len(first) % group == 0]
            return f"group={levels.group} does not divide its rows of {len(first)}: use group={(fits or ['-1'])[-1]}"
        statistic = max((read[reader] for reader in found.readers), key=lambda each: each.rows)
        weights = [matrix for reader in found.readers for matrix in matrices(program, reader)]
        found_scale, _ = awq(weights, statistic.size, statistic.mean, levels)
        return torch.ones(found.size).index_copy(0, first, found_scale)

    def _levels(self, program: Program, context: Context, reader: fx.Node) -> Levels:
        """What the weight of `reader` will be rounded to."""
        weight, layer = program.constants[reader.args[1].target], layer_at(program, reader)
        packing = (each for each in context.later if isinstance(each, PackLinears) and each.covers(layer))
        said = next(filter(None, (each.levels(weight) for each in packing)), Levels(group=128))
        given = {name: value for name in ("bits", "group") if (value := getattr(self, name)) != "auto"}
        return replace(said, **given)
