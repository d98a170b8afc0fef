"""Linear layers with int8 weights, and int8 activations or not.

    constant @up.weight: f32[16, 32]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.qweight: i8[16, 32]
    constant @up.scale: f32[16]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = fxc.int8_linear(%0, @up.qweight, @up.scale, None)  # up (int8)
    return "out" %1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.quantize import STATISTICS, quantized
from fxc.calibrate.ranges import Observer, Range
from fxc.calibrate.signround import STEPS, Rounding
from fxc.calibrate.stages import Statistic
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Fact
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, SMOOTH, arguments
from fxc.passes.fold_batch_norm import FOLDED_BATCH_NORM
from fxc.passes.learned_linears import Parts
from fxc.passes.linears import GROUPED, LINEAR, check_steps
from fxc.passes.tables import PackTables
from fxc.schemes import int4, int8, int8_sparse24, sparse24
from fxc.schemes.scheme import Scheme

LINEARS = (LINEAR, GROUPED, sparse24.LINEAR)
LEVELS = Levels(bits=8, group=-1, full_range=False, balanced=True)


@dataclass(frozen=True)
class Int8(PackTables):
    """Quantize the weights of linear layers, experts of mixtures included, to int8 with one scale for each output channel.

    mode: "dynamic" quantizes activations too, each token by its own range, as the layer runs; "weight_only" keeps them;
    "static" quantizes all that a layer reads by one scale and zero point, learned from calibration data, and takes
    two-dimensional convolutions too, with batch norms folded into them and large channels moved into weights (smooth).
    Of 2:4 sparse weights (sparse24) the numbers that are left are quantized; zeros stay zero, by every algorithm.
    algorithm: rtn rounds each number to its nearest level. From calibration data learn grid, gptq, qronos and round, which
    int4 explains, with one scale for a row, and steps with them; an expert that fewer tokens reach than it has columns is
    packed by grid, or by rtn.
    observer: what range the levels of static activations cover: minmax all of it, percentile all but one number in ten
    thousand, mse what loses least by rounding and, four times as much, by cutting off.
    smooth: whether static goes through smooth first; false for a model whose weights are not all floating-point any more.
    embeddings: int8 or int4 packs the tables that tokens are looked up in too, by row, with a head that is tied to one, which
    static reads as dynamic does; int4 in the largest groups that divide a row.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in int4:only=*.mlp,int8.
    """

    mode: Literal["dynamic", "weight_only", "static"] = "dynamic"
    observer: Observer = "mse"
    algorithm: Literal["rtn", "grid", "gptq", "qronos", "round"] = "rtn"
    steps: int = STEPS
    smooth: bool = True

    name: ClassVar[str] = "int8"
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})
    scheme: ClassVar = int8.SCHEME
    lighter: ClassVar = "algorithm=grid"

    def __post_init__(self) -> None:
        check_steps(self.steps, self.algorithm, "int8")
        if self.mode == "static" and self.algorithm != "rtn":
            hint = "mode=dynamic or weight_only, or algorithm=rtn"
            raise UsageError(f"static layers are rounded to nearest, not by {self.algorithm}", where="int8", hint=hint)

    @property
    def error_of(self) -> str:
        return "inputs" if self.mode == "static" else "outputs"

    @property
    def needs(self) -> frozenset[Fact]:
        facts = {CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION}
        if self.mode == "static":
            facts |= {FOLDED_BATCH_NORM, SMOOTH} if self.smooth else {FOLDED_BATCH_NORM}
        return frozenset(facts)

    @property
    def layers(self) -> tuple[OpOverload, ...]:
        return (*LINEARS, int8.CONV2D) if self.mode == "static" else LINEARS

    def weight(self, program: Program, node: fx.Node) -> Tensor:
        tensor = super().weight(program, node)
        # Rounded to nearest, zeros are no matter.
        return sparse24.unpack(tensor, _places(program, node)) if self._learns_sparse(node) else tensor

    def stored(self, program: Program, node: fx.Node, parts: Parts) -> Parts:
        if not self._learns_sparse(node):
            return parts
        fours = parts["qweight"].unflatten(1, (-1, 4))
        return parts | {"qweight": fours.gather(-1, sparse24.unpack_positions(_places(program, node))).flatten(1)}

    def _learns_sparse(self, node: fx.Node) -> bool:
        return node.target is sparse24.LINEAR and self.algorithm != "rtn"

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        if self.mode == "dynamic" or node.target not in (GROUPED, sparse24.LINEAR):
            return None
        which = "experts" if node.target is GROUPED else "2:4 sparse layers"
        return f"{which} have no {self.mode.replace('_', '-')} form: use mode=dynamic"

    def operator(self, layer: OpOverload) -> OpOverload:
        if layer is sparse24.LINEAR:
            return int8_sparse24.LINEAR
        if layer is GROUPED:
            return int8.GROUPED
        if layer is int8.CONV2D:
            return int8.STATIC_CONV2D
        return {"dynamic": int8.LINEAR, "weight_only": int8.WEIGHT_ONLY, "static": int8.STATIC}[self.mode]

    def levels(self, weight: Tensor) -> Levels | None:
        return LEVELS

    def statistic(self) -> Callable[[int], Statistic] | None:
        return Range if self.mode == "static" else STATISTICS.get(self.algorithm)

    def fits_data(self) -> bool:
        return self.mode == "static"

    def needs_data(self) -> str | None:
        if self.mode == "static":
            return "mode=static is"
        return f"algorithm={self.algorithm} is" if self.uses_data() else None

    def learned(self, weight: Tensor, statistic: Statistic) -> tuple[Parts, float]:
        if self.mode == "static":
            scale, zero = statistic.scale_and_zero(self.observer)
            return {**self.pack(weight), "x_scale": scale, "x_zero": zero}, statistic.error(scale, zero)
        keep = weight != 0
        made = quantized(self.algorithm, weight, statistic, LEVELS, keep=None if keep.all() else keep)
        return self.settled(made), made.error

    def cut_off(self, parts: Parts, statistic: Statistic) -> float | None:
        return statistic.beyond(parts["x_scale"], parts["x_zero"]) if self.mode == "static" else None

    def training(self) -> int:
        return self.steps if self.algorithm == "round" else 0

    def settled(self, made: Quantized) -> Parts:
        return {"qweight": (made.q.short() - LEVELS.middle).to(torch.int8), "scale": made.scale.squeeze(-1)}

    def rounding(self, weight: Tensor, parts: Parts) -> Rounding | None:
        if weight.ndim != 2:
            return None
        q = (parts["qweight"].short() + LEVELS.middle).to(torch.uint8)
        return Rounding(weight, Quantized(LEVELS, q, parts["scale"].unsqueeze(-1), None, 0.0))

    def tied(self, scheme: Scheme) -> OpOverload:
        if scheme is int4.SCHEME:
            return int4.LINEAR
        return int8.WEIGHT_ONLY if self.mode == "weight_only" else int8.LINEAR


def _places(program: Program, node: fx.Node) -> Tensor:
    return program.constants[arguments(node)["meta"].target]
