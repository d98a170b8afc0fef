"""What becomes one call on a CPU where programs run node by node: a norm with the sum in front of it, a rotation, a gate."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.lower.fusion import insert_norm, is_plain_sum, match_rms_norm, match_rope
from fxc_kernels.cpu import native_between, ops

_ADD = torch.ops.aten.add.Tensor
_MUL = torch.ops.aten.mul.Tensor
_SILU = torch.ops.aten.silu.default
_LAYER_NORM = torch.ops.aten.layer_norm.default


def fuse(program: Program) -> None:
    """Nothing on a machine that has no kernels in C++."""
    if native_between.why_not():
        return
    for node in program.graph.find_nodes(op="call_function", target=_MUL):
        if _is_taken(node) and (norm := match_rms_norm(node)) is not None:
            rest = (norm.weight, norm.eps)
            _insert(program, node, norm.source, (ops.RMS_NORM, *rest), (ops.ADD_RMS_NORM, *rest))
    edit.sweep(program)
    for node in program.graph.find_nodes(op="call_function", target=_LAYER_NORM):
        call = Call(node)
        x, gains = call[0], [call["weight"], call["bias"]]
        dtype = x.meta["val"].dtype
        fits = all(each is None or (each.op == "get_attr" and each.meta["val"].dtype == dtype) for each in gains)
        if _is_taken(node) and fits and len(call["normalized_shape"]) == 1:
            rest = (*gains, call["eps"])
            if is_plain_sum(x) and len(x.users) == 1:  # nobody else reads the sum
                edit.call(program, ops.LAYER_NORM, (*x.args, *rest), replacing=node, by="lower")
            else:
                _insert(program, node, x, (ops.LAYER_NORM, None, *rest), (ops.ADD_LAYER_NORM, *rest))
    edit.sweep(program)
    for node in program.graph.find_nodes(op="call_function", target=_ADD):
        if _is_taken(node) and (given := match_rope(node)) is not None:
            edit.call(program, ops.ROPE, given, replacing=node, by="lower")
    edit.sweep(program)
    for node in program.graph.find_nodes(op="call_function", target=_MUL):
        if _is_taken(node) and (pair := _gate(node)) is not None:
            edit.call(program, ops.SILU_MUL, pair, replacing=node, by="lower")
    edit.sweep(program)


def _is_taken(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dtype in native_between.DTYPES


def _insert(program: Program, node: fx.Node, x: fx.Node, plain: tuple, with_sum: tuple) -> None:
    """A norm of `x` in the place of `node`, with the sum that x is in front of it."""
    made, has_sum = insert_norm(program, x, node, plain, with_sum, 1)
    if has_sum:
        at = {"before": made.next, "by": "lower", "fqn": node.meta.get("fqn", "")}
        made = edit.insert(program, operator.getitem, (made, 0), **at)
    edit.replace(node, made)


def _gate(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(gate, up) where `node` is silu(gate) * up."""
    if node.kwargs or not all(isinstance(each, fx.Node) for each in node.args):
        return None
    for silu, up in (node.args, reversed(node.args)):
        if silu.target is _SILU and len(silu.users) == 1:
            gate = silu.args[0]
            if edit.type_of(gate.meta["val"]) == edit.type_of(up.meta["val"]) == edit.type_of(node.meta["val"]):
                return gate, up
    return None
