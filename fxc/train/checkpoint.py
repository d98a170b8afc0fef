"""Checkpointing of activations: of each block only what it is given is kept for the gradient, and it is run again for it.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, on the blocks that `fxc.calibrate.blocks` finds:
memory of what lies between blocks and of one block, for about a third more time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from fxc.calibrate.blocks import blocks
from fxc.ir.program import Program


class Piece(nn.Module):
    """Runs `inner`, and again when its gradient is asked for. What is left out at random is the same both times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args)
        return checkpoint(self.inner, *args, use_reentrant=False)


def in_pieces(module: fx.GraphModule, program: Program, made: Mapping[fx.Node, fx.Node]) -> fx.GraphModule:
    """`module` with each block of `program` as a piece; it is not changed, and as it is where there is but one block. made:
    nodes of the program -> those of the module that give the same."""
    places = {node: at for at, node in enumerate(module.graph.nodes)}
    ends = [places[made[block.nodes[-1]]] for block in blocks(program, packed=True)[:-1]]
    if not ends:
        return module
    parts = {node.name: sum(at > end for end in ends) for node, at in places.items()}
    split = split_module(module, module, lambda node: parts[node.name], keep_original_order=True)
    for name, inner in list(split.named_children()):
        if name.startswith("submod_"):
            setattr(split, name, Piece(inner))
    return split
