"""Linear layers with 2:4 sparse weights: of every four neighbours along a row two stay, the largest in magnitude or others.

    constant @up.weight: f32[16, 32]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.meta: u8[16, 4]
    constant @up.values: f32[16, 16]
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = fxc.sparse24_linear(%0, @up.values, @up.meta, None)  # up (sparse24)
    return "out" %1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxc.calibrate import gradients, prune
from fxc.calibrate.masks import keep_n_of_m
from fxc.calibrate.stages import Statistic
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, check_data_is_given
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION
from fxc.passes.learning import announce_backward
from fxc.passes.linears import GROUPED, PackLinears
from fxc.schemes import sparse24


@dataclass(frozen=True)
class Sparse24(PackLinears):
    """Set to zero two of every four neighbours along a row of a linear layer's weight, and store the others with their places.
    With int8 the numbers that are left are quantized.

    criterion: which go. magnitude: the smaller ones. From calibration data learn wanda: the smaller ones times the norm of what
    they meet (Wanda, arXiv 2306.11695); and sparsegpt: those whose going the others can best make up for, which they do
    (SparseGPT, arXiv 2301.00774), then each four choose anew, all others known, and all that stay are fitted once more to what
    the layer gave (arXiv 2401.02938). Both take layers in the order in which they run, each by what it reads behind sparse
    ones. A layer that no sample reaches loses its smaller numbers. taylor: those by whose going the loss changes less, to first
    order (Molchanov et al., CVPR 2019), which takes the memory of a gradient and a score for each number.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in sparse24:only=*.mlp,int8.
    """

    criterion: Literal["magnitude", "wanda", "sparsegpt", "taylor"] = "magnitude"

    name: ClassVar[str] = "sparse24"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({DENSE_WEIGHTS})
    lighter: ClassVar = "criterion=wanda"
    scheme: ClassVar = sparse24.SCHEME
    # Half of the weights go: it is measured, reported, and limited only by --budget.
    limits: ClassVar[tuple[float, float]] = (float("inf"), float("inf"))

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        if node.target is GROUPED:
            return "there is no 2:4 form of the experts of a mixture: int8 has a dense one"
        columns = weight.shape[-1]
        if columns % sparse24.BYTE == 0:
            return None
        rule = f"its rows of {columns} are not a multiple of 4, and 2:4 is of four neighbours"
        if columns % 4 == 0:
            rule = f"its rows of {columns} are not a multiple of 8, and a byte holds the places of two groups of four"
        return f"{rule}: leave it, or prune with round_to=8 where prune made the rows"

    def statistic(self) -> Callable[[int], Statistic] | None:
        return prune.STATISTICS.get(self.criterion)

    def uses_data(self) -> bool:
        return self.criterion != "magnitude"

    def needs_data(self) -> str | None:
        return f"criterion={self.criterion} is" if self.uses_data() else None

    def prepare(self, program: Program, chosen: list[fx.Node], context: Context) -> None:
        if self.criterion != "taylor":
            return
        check_data_is_given([self], bool(context.samples))
        weights = list(dict.fromkeys(node.args[1].target for node in chosen))
        announce_backward(self, program, context, sum(program.constants[fqn].numel() for fqn in weights))
        samples = context.track(context.samples, "scoring numbers by taylor", len(context.samples))
        for fqn, scores in gradients.scores(program, weights, samples, context.seed).items():
            program.constants[fqn] = torch.where(keep_n_of_m(scores), program.constants[fqn], 0)

    def learned(self, weight: Tensor, statistic: Statistic) -> tuple[dict[str, Tensor], float]:
        made = prune.learned(self.criterion, weight, statistic, pattern=(2, 4))
        values, meta = sparse24.pack(made.weight.to(weight.dtype))
        return {"values": values, "meta": meta}, made.error
