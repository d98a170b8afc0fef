"""What becomes one call on a CPU where programs run node by node: a norm with the sum in front of it, a rotation, a gate."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.lower.fusion import is_plain_sum, match_rms_norm, match_rope
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
            _insert(program, node, norm.source, ops.RMS_NORM, (), ops.ADD_RMS_NORM, (norm.weight, norm.eps))
    edit.sweep(program)
    for node in program.graph.find_nodes(op="call_function", target=_LAYER_NORM):
        call = Call(node)
        x, gains = call[0], [call["weight"], call["bias"]]
        dtype = x.meta["val"].dtype
        fits = all(each is None or (each.op == "get_attr" and each.meta["val"].dtype == dtype) for each in gains)
        if _is_taken(node) and fits and len(call["normalized_shape"]) == 1:
            _insert(program, node, x, ops.LAYER_NORM, (None,), ops.ADD_LAYER_NORM, (*gains, call["eps"]))
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


def _insert(
    program: Program, node: fx.Node, x: fx.Node, plain: object, other: tuple, with_sum: object, rest: tuple
) -> None:
    """A norm of `x` in the place of `node`, or of the two that x is the sum of, a second result where others read that."""
    place = {"before": node, "by": "lower", "fqn": node.meta.get("fqn", "")}
    if not is_plain_sum(x):
        edit.replace(node, edit.insert(program, plain, (x, *other, *rest), **place))
        return
    readers = [user for user in x.users if user is not node]
    if plain is ops.LAYER_NORM and not readers:
        edit.replace(node, edit.insert(program, plain, (*x.args, *rest), **place))
        return
    # Where the sum is, because what reads it may stand before the norm.
    place["before"] = x.next
    rest = tuple(edit.read(program, each.target, x.next) if isinstance(each, fx.Node) else each for each in rest)
    made = edit.insert(program, with_sum, (*x.args, *rest), **place)
    edit.replace(node, edit.insert(program, operator.getitem, (made, 0), **place))
    edit.replace(x, edit.insert(program, operator.getitem, (made, 1), **place))


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
