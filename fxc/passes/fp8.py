"""Linear layers with fp8 (e4m3) weights, and fp8 activations or not.

    constant @up.weight: f32[16, 32]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.qweight: f8e4m3[16, 32]
    constant @up.scale: f32[16]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = fxc.fp8_linear(%0, @up.qweight, @up.scale, None)  # up (fp8)
    return "out" %1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch._ops import OpOverload

from fxc.calibrate.ranges import Range
from fxc.passes.base import Fact
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION
from fxc.passes.learned_linears import Parts
from fxc.passes.linears import LINEAR, PackLinears
from fxc.schemes import fp8


@dataclass(frozen=True)
class Fp8(PackLinears):
    """Round the weights of linear layers to fp8 (e4m3), with one scale for each output channel.

    mode: "dynamic" rounds activations too, each token by its own range, as the layer runs; "weight_only" keeps them; "static"
    rounds all that a layer reads by one scale, which puts the largest number in the calibration data at 448.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in fp8:only=*.mlp,int8.
    """

    mode: Literal["dynamic", "weight_only", "static"] = "dynamic"

    name: ClassVar[str] = "fp8"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})
    scheme: ClassVar = fp8.SCHEME
    error_of: ClassVar[str] = "inputs"
    # Three bits of mantissa: a layer moves by about a twenty-fifth.
    limits: ClassVar[tuple[float, float]] = (0.3, 0.15)

    def operator(self, layer: OpOverload) -> OpOverload | None:
        if layer is not LINEAR:
            return None
        return {"dynamic": fp8.LINEAR, "weight_only": fp8.WEIGHT_ONLY, "static": fp8.STATIC}[self.mode]

    def statistic(self) -> type[Range] | None:
        return Range if self.mode == "static" else None

    def fits_data(self) -> bool:
        return self.mode == "static"

    def needs_data(self) -> str | None:
        return "mode=static is" if self.mode == "static" else None

    def learned(self, weight: Tensor, statistic: Range) -> tuple[Parts, float]:
        scale = statistic.float_scale(fp8.FP8_MAX)
        error = statistic.error_of(lambda x: fp8.unpack(fp8.pack(x / scale)) * scale)
        return {**self.pack(weight), "x_scale": scale}, error
