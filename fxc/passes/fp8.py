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

from torch._ops import OpOverload

from fxc.passes.base import Fact
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.linears import LINEAR, PackLinears
from fxc.schemes import fp8


@dataclass(frozen=True)
class Fp8(PackLinears):
    """Round the weights of linear layers to fp8 (e4m3), with one scale for each output channel.

    mode: "dynamic" rounds activations too, each token by its own range, as the layer runs; "weight_only" keeps them.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in fp8:only=*.mlp,int8.
    """

    mode: Literal["dynamic", "weight_only"] = "dynamic"

    name: ClassVar[str] = "fp8"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, DENSE_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})
    scheme: ClassVar = fp8.SCHEME
    # Three bits of mantissa: a layer moves by about a twenty-fifth.
    limits: ClassVar[tuple[float, float]] = (0.3, 0.15)

    def operator(self, layer: OpOverload) -> OpOverload | None:
        if layer is not LINEAR:
            return None
        return fp8.LINEAR if self.mode == "dynamic" else fp8.WEIGHT_ONLY
