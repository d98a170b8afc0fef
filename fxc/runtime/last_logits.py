"""The lowered program of a causal language model that gives the logits of the last position alone, which is all that generation
asks for after a prompt: a head with 150,000 outputs is a quarter of the work of a small model."""

from __future__ import annotations

import torch
from torch import fx

from fxc.ir import edit
from fxc.ir.check import check
from fxc.ir.program import Program
from fxc.schemes.scheme import LINEAR
from fxc_kernels.cpu import ops

_aten = torch.ops.aten
# What may stand between a head and the logits: numbers that are capped or scaled, each by itself.
_EACH = {_aten.tanh.default, _aten.mul.Tensor, _aten.div.Tensor, _aten.to.dtype}
_HEADS = {LINEAR, ops.DENSE_LINEAR, ops.INT8_LINEAR, ops.SPLIT_LINEAR, ops.NATIVE_INT8_LINEAR, ops.NATIVE_INT4_LINEAR}


def last_logits(lowered: Program) -> Program | None:
    """A program over the constants of `lowered`, which is not changed, whose logits are [B, 1, vocabulary]; None where what
    gives the logits is no product of each position by itself."""
    program = lowered.copy()
    place = program.signature.outputs.index("logits")
    results = program.results
    behind: list[fx.Node] = []
    head = results[place]
    while head.target in _EACH and len(head.all_input_nodes) == 1:
        behind.append(head)
        head = head.args[0]
    if head.target not in _HEADS or head.meta["val"].dim() != 3:
        return None
    at = {"before": program.graph.output_node(), "by": "lower", "fqn": head.meta.get("fqn", "")}
    last = edit.insert(program, _aten.select.int, (head.args[0], 1, -1), **at)
    made = edit.insert(program, _aten.unsqueeze.default, (last, 1), **at)
    for node in (head, *reversed(behind)):
        made = edit.insert(program, node.target, (made, *node.args[1:]), kwargs=dict(node.kwargs), **at)
    results[place] = made
    program.graph.output_node().args = (tuple(results),)
    edit.sweep(program)
    check(program, lowered=True)
    return program
