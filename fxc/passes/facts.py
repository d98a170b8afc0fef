"""The facts that passes need, give and break. Each can be checked, and is, after every pass that claims it."""

from __future__ import annotations

import torch
from torch import fx

from fxc.ir.program import Program
from fxc.passes.base import Fact

aten = torch.ops.aten


def _is_constant_matrix(node: object, program: Program) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and program.constants[node.target].ndim == 2


def _not_canonical(program: Program) -> str | None:
    for node in program.graph.nodes:
        if node.target in (aten.mm.default, aten.matmul.default) and _is_constant_matrix(node.args[1], program):
            return f"{node} multiplies by the constant {node.args[1].target} and is not a linear"
        if node.target is aten.addmm.default and _is_constant_matrix(node.args[2], program):
            return f"{node} multiplies by the constant {node.args[2].target} and is not a linear"
    return None


def _has_packed_weight(program: Program) -> str | None:
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target.endswith(".qweight"):
            return f"{node.target} is a quantized weight"
    return None


CANONICAL = Fact("canonical", _not_canonical)
"""A product with a constant matrix is an `aten.linear` (or a grouped one) and nothing that does nothing is left."""

FLOAT_WEIGHTS = Fact("float_weights", _has_packed_weight)
"""Every weight is still a floating-point tensor of its own shape, so that it can be pruned or quantized."""
