"""What is left out at random while training: numbers of what a residual branch adds, or the whole branch."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxc.calibrate.blocks import blocks
from fxc.ir.program import Program

ADD = torch.ops.aten.add.Tensor


class Noise(nn.Module):
    """Of a residual branch, in training: with probability `layer_drop` nothing of it (LayerDrop, Fan et al., arXiv 1909.11556,
    after which layers can be taken out), else each number with probability `dropout` not, and the others larger by as much
    (Srivastava et al., JMLR 2014). In evaluation everything, unscaled. Draws from torch's own generator."""

    def __init__(self, layer_drop: float, dropout: float) -> None:
        super().__init__()
        self.layer_drop, self.dropout = layer_drop, dropout

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        if self.layer_drop and float(torch.rand(())) < self.layer_drop:
            return torch.zeros_like(branch)
        return nn.functional.dropout(branch, self.dropout) if self.dropout else branch


def branches(program: Program) -> list[fx.Node]:
    """What is added to the residual stream at the end of a block, in order; nothing of a block that ends otherwise."""
    found = []
    for block in blocks(program):
        ends = block.leaves
        if ends is not None and block.enters is not None and ends.target is ADD and block.enters in ends.args[:2]:
            others = [each for each in ends.args[:2] if isinstance(each, fx.Node) and each is not block.enters]
            found += [each for each in others if len(each.users) == 1]
    return found
