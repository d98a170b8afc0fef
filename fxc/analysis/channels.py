"""Where the channels of a value go: which layers read each, and which of them cannot be multiplied by a number on the way.

Whatever is computed from a channel between here and the layers that read it is homogeneous: of x times s (s > 0) it gives what
it gave of x, times s. So the one can be undone in the other. Channels are followed as numbers, 0 .. C-1, along the rules by
which constants are known (`analysis/constants.py`), through reshapes, heads and attention, until a layer sums over them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxc.analysis.constants import Known, State, uniform
from fxc.analysis.operators import operator_of
from fxc.ir.call import Call
from fxc.ir.program import Program, users_of
from fxc.schemes.ops import GROUPED_LINEAR

aten = torch.ops.aten
_MOVES = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.movedim.int, aten.swapaxes.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
    aten.index.Tensor, aten.index_select.default, aten.repeat_interleave.self_int, aten.contiguous.default,
    aten.clone.default,
}  # fmt: skip
"""What computes no new numbers, but moves and copies those of its first argument."""
_HOMOGENEOUS = {
    aten.relu.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default, aten.dropout.default, aten.to.dtype,
    aten.type_as.default,
}  # fmt: skip
_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


@dataclass
class Reach:
    """size: C; readers: layer -> [K] int64, which channel each of its inputs is; added: a constant [K] that is added on the
    way -> [K]; blocked: channel -> why it cannot be scaled."""

    size: int
    readers: dict[fx.Node, Tensor] = field(default_factory=dict)
    added: dict[fx.Node, Tensor] = field(default_factory=dict)
    blocked: dict[int, str] = field(default_factory=dict)


class _Blocked(Exception):
    """Why the channels that a node reads cannot be scaled."""


def reach(program: Program, source: fx.Node) -> Reach:
    """Where the channels of `source` go, those of its last dimension, of C."""
    channels = torch.arange(source.meta["val"].shape[-1])
    found, state = Reach(len(channels)), State(program)
    shape = (1,) * (source.meta["val"].ndim - 1)
    state.found[source] = Known(channels.reshape(*shape, -1), torch.ones(*shape, len(channels), dtype=torch.bool))
    open_ = set(source.users)
    node = source
    while open_:
        node = node.next
        if node not in open_:
            continue
        open_.remove(node)
        try:
            if (made := _step(program, state, found, node)) is not None:
                state.found[node] = made
                open_ |= set(node.users)
        except _Blocked as why:
            for given in node.all_input_nodes:
                _block(found, state.found.get(given), str(why))
    return found


def _block(found: Reach, known: Any, why: str) -> None:
    for part in known if isinstance(known, list) else [known]:
        for channel in [] if part is None else part.values[part.mask].unique().tolist():
            found.blocked.setdefault(channel, why)


def _step(program: Program, state: State, found: Reach, node: fx.Node) -> Any:
    """The channels of what `node` computes; None of one that sums over them, which `found` then has."""
    if node.op == "output":
        raise _Blocked("the program returns it")
    target, given = node.target, [each for each in node.all_input_nodes if each in state.found]
    if target is _ATTENTION:
        return _attended(state, found, node)
    if len(given) > 1:
        raise _Blocked(f"{said(node)} reads it twice")
    known = state.found[given[0]]
    if target in (aten.linear.default, GROUPED_LINEAR):
        if node.args.index(given[0]) != 0 or node.args[1].op != "get_attr":
            raise _Blocked("it is a weight that is computed")
        if users_of(program, node.args[1].target) != [node]:
            raise _Blocked(f"{node.args[1].target}, which reads it, is read by others too")
        found.readers[node] = _last(known, node.args[0], node)
        return None
    if target in _MOVES:
        if node.args[0] is not given[0]:
            raise _Blocked(f"{said(node)} takes it for a number")
        return _complete(operator_of(target).known(state, Call(node)), node)
    if target in _PRODUCTS and node.args[1] is given[0] and node.args[0] is not given[0]:
        return _ranked(_complete(uniform(known, [known.values.ndim - 2]), node), node)
    if target in _HOMOGENEOUS:
        return known if node.args[0] is given[0] else None  # type_as reads the dtype alone of its second argument
    if target is aten.mul.Tensor or (target is aten.div.Tensor and node.args[0] is given[0]):
        if node.args[0] is node.args[1]:
            raise _Blocked("it is multiplied by itself")
        return _ranked(known, node)
    if target in _SUMS and _may_scale(program, other := node.args[node.args[0] is given[0]], node):
        found.added[other] = _last(known, given[0], node)
        return known
    raise _Blocked(f"{said(node)} reads it, which does not scale with it")


def comes_from(layer: fx.Node) -> fx.Node:
    """What computed the numbers that `layer` reads."""
    node = layer.args[0]
    while node.target in _MOVES | _HOMOGENEOUS | {_ATTENTION}:
        node = Call(node)["value"] if node.target is _ATTENTION else node.args[0]
    return node


def _attended(state: State, found: Reach, node: fx.Node) -> Known | None:
    """The channels of its values, those of each head that has them; what is compared cannot be scaled."""
    call = Call(node)
    for name in ("query", "key", "attn_mask"):
        if isinstance(call[name], fx.Node):
            _block(found, state.found.get(call[name]), "attention compares it")
    if (known := state.found.get(call["value"])) is None:
        return None
    known = _complete(uniform(known, [known.values.ndim - 2]), node)
    heads, its = call.value.shape[-3] if call.rank > 2 else 1, known.values.shape[-3] if call.rank > 2 else 1
    return known.map(lambda t: t.repeat_interleave(heads // its, -3)) if 1 < its < heads else known


def _may_scale(program: Program, other: Any, node: fx.Node) -> bool:
    """Whether `other` is a constant vector along the last dimension of `node` that nothing else reads."""
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return False
    if program.constants[other.target].shape != node.meta["val"].shape[-1:]:
        return False
    return users_of(program, other.target) == [node]


def _complete(known: Any, node: fx.Node) -> Any:
    parts = known if isinstance(known, list) else [known]
    if any(part is None or not part.is_complete for part in parts):
        raise _Blocked(f"{said(node)} mixes it with other values")
    return known


def _ranked(known: Known, node: fx.Node) -> Known:
    """With as many dimensions as `node` has."""
    missing = node.meta["val"].ndim - known.values.ndim
    return known.map(lambda t: t.reshape(*[1] * missing, *t.shape))


def _last(known: Known, value: fx.Node, node: fx.Node) -> Tensor:
    """[K]: the channel of each index of the last dimension."""
    known = _complete(uniform(known, list(range(known.values.ndim - 1))), node)
    return known.values.reshape(-1).expand(value.meta["val"].shape[-1])


def said(node: fx.Node) -> str:
    """A node, for people."""
    if node.op != "call_function":
        return f"the input {node.name}" if node.op == "placeholder" else node.name
    where = node.meta.get("fqn")
    return f"{Call(node).name} in {where}" if where else Call(node).name
