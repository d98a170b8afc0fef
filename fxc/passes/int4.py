"""Linear layers with int4 weights in groups along their rows; activations stay as they are.

    constant @up.weight: f32[16, 256]
    %0: f32[s0, 256] = input "x"
    %1: f32[s0, 16] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.qweight: u8[16, 128]
    constant @up.scale: f32[16, 2]
    %0: f32[s0, 256] = input "x"
    %1: f32[s0, 16] = fxc.int4_weight_only_linear(%0, @up.qweight, @up.scale, None, None, 128)  # up (int4)
    return "out" %1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.quantize import STATISTICS, quantized
from fxc.calibrate.signround import STEPS, Rounding
from fxc.calibrate.stages import Statistic
from fxc.errors import UsageError
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Result
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, arguments
from fxc.passes.learned_linears import Parts
from fxc.passes.linears import GROUPED, LINEAR, check_steps
from fxc.passes.tables import PackTables
from fxc.schemes import int4, int4_sparse24, int8, sparse24
from fxc.schemes.scheme import Scheme, scheme_of

# Bits -> the largest errors of outputs and of a layer. A layer moves by about a tenth, a fifth and two fifths; what wrongly
# packed weights would do is far above.
LIMITS = {4: (0.5, 0.3), 3: (0.7, 0.45), 2: (1.0, 0.75)}


@dataclass(frozen=True)
class Int4(PackTables):
    """Round the weights of linear layers to int4, with one scale for each group along a row: of six the nearest.

    algorithm: rtn rounds each number to its nearest level. From calibration data learn grid: of 200 scales the best by E[x^2]
    of what the layer reads (as AutoRound without training, arXiv 2309.05516); and gptq: numbers make up for the rounding of
    others (GPTQ, arXiv 2210.17323), then levels and scales are improved in turn (QuantEase, arXiv 2309.01885) where that is
    better; qronos: numbers first make up for what the layers before are off (Qronos, arXiv 2505.11695), then as gptq; and
    round: from there levels and scales of half a block are trained together by what it gives (SignRound, arXiv 2309.05516), and
    kept where that is better on samples held out; it takes some times as long. steps: so many of training, for round.
    All pack layers in the order in which they run, each by what it reads behind packed ones. A layer that no sample reaches
    is packed as by rtn.
    group: how many neighbours share a scale, 32, 64 or 128; it has to divide the length of a row. auto is for each layer the
    largest that does. symmetric: true keeps 0 in the middle of the range; false adds a zero point to each group, for weights
    that lie on one side. full_range: the number of largest magnitude in a symmetric group is the lowest of all sixteen levels,
    and the scale negative where it is positive; false keeps scales positive, for tools that need that. bits: 4, or 3 or 2, and
    so many are stored.
    Zeros stay zero (sparsify), and of 2:4 sparse weights (sparse24) the numbers that are left are rounded: by gptq and qronos
    those make up for both.
    embeddings: int8 or int4 packs the tables that tokens are looked up in too, by row, with a head that is tied to one, to
    nearest; int4 with group, symmetric and full_range, 4 bits, and with bits=4 by the algorithm if a head is tied to it.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in int4:only=*.mlp,int8.
    """

    group: int | Literal["auto"] = 128
    symmetric: bool = True
    full_range: bool = True
    bits: int = 4
    algorithm: Literal["rtn", "grid", "gptq", "qronos", "round"] = "rtn"
    steps: int = STEPS

    name: ClassVar[str] = "int4"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})
    lighter: ClassVar = "algorithm=grid"
    layers: ClassVar = (LINEAR, GROUPED, sparse24.LINEAR)

    @property
    def scheme(self) -> Scheme:
        return int4.SCHEMES[self.bits]

    @property
    def limits(self) -> tuple[float, float]:
        return LIMITS[self.bits]

    def __post_init__(self) -> None:
        if self.bits not in int4.SCHEMES:
            raise UsageError(f"bits={self.bits} is no number of bits that it stores", where="int4", hint="one of 4, 3, 2")
        if self.group not in (*int4.GROUPS, "auto"):
            sizes = ", ".join(map(str, (*int4.GROUPS, "auto")))
            raise UsageError(f"group={self.group} is not a size of groups", where="int4", hint=f"one of {sizes}")
        check_steps(self.steps, self.algorithm, "int4")

    def operator(self, layer: OpOverload) -> OpOverload | None:
        if layer is sparse24.LINEAR:
            return int4_sparse24.LINEAR if self.bits == int4.BITS else None
        return super().operator(layer)

    def weight(self, program: Program, node: fx.Node) -> Tensor:
        tensor = super().weight(program, node)
        if node.target is not sparse24.LINEAR:
            return tensor
        return sparse24.unpack(tensor, program.constants[arguments(node)["meta"].target])

    def stored(self, program: Program, node: fx.Node, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if node.target is not sparse24.LINEAR:
            return parts
        return parts | {"qweight": int4_sparse24.thinned(parts["qweight"], program.constants[arguments(node)["meta"].target])}

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        if node.target is sparse24.LINEAR and self.operator(node.target) is None:
            return f"there is no 2:4 form of {self.bits} bits: use bits=4"
        if reason := super().declines(node, weight):
            return reason
        columns = weight.shape[-1]
        fits = [group for group in int4.GROUPS if columns % group == 0]
        if self.group in fits or (self.group == "auto" and fits):
            return None
        if self.group == "auto":
            return f"no size of groups divides its rows of {columns}: leave it, or use int8"
        what_to_do = f"use int4:group={fits[-1]}" if fits else "no size of groups does: leave it, or use int8"
        return f"group={self.group} does not divide its rows of {columns}: {what_to_do}"

    def options(self, columns: int) -> dict[str, Any]:
        return super().options(columns) | {"group": self._group(columns)}

    def tied(self, scheme: Scheme) -> OpOverload:
        return int8.WEIGHT_ONLY if scheme is int8.SCHEME else int4.LINEAR

    def table_options(self, scheme: Scheme, columns: int) -> dict[str, Any]:
        given = super().table_options(scheme, columns)
        if scheme is int8.SCHEME:
            return given
        group = given["group"] if self.group == "auto" else self.group if columns % self.group == 0 else 0
        return {"group": group, "symmetric": self.symmetric, "full_range": self.full_range}

    def _group(self, columns: int) -> int:
        """How many numbers share a scale in rows of `columns`; 0 where no size of groups divides them."""
        return self.group if self.group != "auto" else max((each for each in int4.GROUPS if columns % each == 0), default=0)

    def run(self, program: Program, context: Context) -> Result:
        result = super().run(program, context)
        layers: dict[int, list[str]] = {}
        if self.group == "auto":
            for node in program.graph.nodes:
                if scheme_of(node.target) in (self.scheme, int4_sparse24.SCHEME) and node.meta.get("by") == self.name:
                    layers.setdefault(arguments(node)["group"], []).append(layer_at(program, node))
        if layers:
            most, *others = sorted(layers, key=lambda group: -len(layers[group]))
            said = "".join(f"; of {group} in {', '.join(layers[group])}" for group in others)
            result.notes.append(f"groups of {most} in {len(layers[most])} layers{said}")
        return result

    def statistic(self) -> Callable[[int], Statistic] | None:
        return STATISTICS.get(self.algorithm)

    def needs_data(self) -> str | None:
        return f"algorithm={self.algorithm} is" if self.uses_data() else None

    def learned(self, weight: Tensor, statistic: Statistic) -> tuple[Parts, float]:
        keep = weight != 0
        made = quantized(self.algorithm, weight, statistic, self.levels(weight), keep=None if keep.all() else keep)
        return self.settled(made), made.error

    def training(self) -> int:
        return self.steps if self.algorithm == "round" else 0

    def settled(self, made: Quantized) -> Parts:
        parts = {"qweight": int4.pack(made.q, self.bits), "scale": made.scale, "zero": made.zero}
        return {part: tensor for part, tensor in parts.items() if tensor is not None}

    def rounding(self, weight: Tensor, parts: Parts) -> Rounding | None:
        q = int4.unpack(parts["qweight"], self.bits)
        return Rounding(weight, Quantized(self.levels(weight), q, parts["scale"], parts.get("zero"), 0.0))

    def levels(self, weight: Tensor) -> Levels | None:
        kept = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        group = self._group(weight.shape[-1])
        return Levels(self.bits, group, self.symmetric, self.full_range, kept) if group else None
