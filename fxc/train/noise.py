"""What is left out at random while training: numbers of what a residual branch adds, or the whole branch."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxc.ir.names import weight_of
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
    """What is added to a value that it was computed from, by at least one layer, and is read by nothing else: in order."""
    numbers = {node: at for at, node in enumerate(program.graph.nodes)}
    # Of each node, itself and what it was computed from, a bit each.
    past: dict[fx.Node, int] = {}
    layers = 0
    found = []
    for node, at in numbers.items():
        past[node] = 1 << at
        for each in node.all_input_nodes:
            past[node] |= past[each]
        if node.op != "call_function":
            continue
        if weight_of(program, node) is not None:
            layers |= 1 << at
        if node.target is not ADD or not all(isinstance(each, fx.Node) for each in node.args[:2]):
            continue
        for stream, branch in (node.args[:2], node.args[1::-1]):
            is_later = past[branch] >> numbers[stream] & 1 and branch is not stream
            if is_later and past[branch] & ~past[stream] & layers and len(branch.users) == 1:
                found.append(branch)
    return found
