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

from fxc.passes.base import Fact
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS
from fxc.passes.linears import GROUPED, LINEAR, SPARSE, Form, PackLinears, bias_of
from fxc.schemes import int8 as scheme
from fxc.schemes import ops


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
    layers: ClassVar = (LINEAR, GROUPED, SPARSE)

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        if self.mode == "weight_only" and node.target is GROUPED:
            return "experts have no weight-only form: use mode=dynamic"
        if self.mode == "weight_only" and node.target is SPARSE:
            return "2:4 sparse layers have no weight-only form: use mode=dynamic"
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("qweight", "scale"), scheme.quantize_weight(weight), strict=True))

    def form(self, node: fx.Node, parts: dict[str, fx.Node]) -> Form:
        x, qweight, scale = node.args[0], parts["qweight"], parts["scale"]
        if node.target is GROUPED:
            return ops.INT8_GROUPED_LINEAR, (x, qweight, scale, node.args[2])
        if node.target is SPARSE:
            return ops.INT8_SPARSE24_LINEAR, (x, qweight, node.args[2], scale, bias_of(node))
        operator = ops.INT8_LINEAR if self.mode == "dynamic" else ops.INT8_WEIGHT_ONLY_LINEAR
        return operator, (x, qweight, scale, bias_of(node))
