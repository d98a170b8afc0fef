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

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.passes.base import Fact
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS
from fxc.passes.linears import GROUPED, LINEAR, PackLinears
from fxc.schemes import int8, int8_sparse24, sparse24


@dataclass(frozen=True)
class Int8(PackLinears):
    """Quantize the weights of linear layers, experts of mixtures included, to int8 with one scale for each output channel.

    mode: "dynamic" quantizes activations too, each token by its own range, as the layer runs; "weight_only" keeps them.
    Of 2:4 sparse weights (sparse24) the numbers that are left are quantized.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in int4:only=*.mlp,int8.
    """

    mode: Literal["dynamic", "weight_only"] = "dynamic"

    name: ClassVar[str] = "int8"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})
    scheme: ClassVar = int8.SCHEME
    layers: ClassVar = (LINEAR, GROUPED, sparse24.LINEAR)

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        if self.mode == "weight_only" and node.target is GROUPED:
            return "experts have no weight-only form: use mode=dynamic"
        if self.mode == "weight_only" and node.target is sparse24.LINEAR:
            return "2:4 sparse layers have no weight-only form: use mode=dynamic"
        return None

    def operator(self, layer: OpOverload) -> OpOverload:
        if layer is sparse24.LINEAR:
            return int8_sparse24.LINEAR
        if layer is GROUPED:
            return int8.GROUPED
        return int8.LINEAR if self.mode == "dynamic" else int8.WEIGHT_ONLY
