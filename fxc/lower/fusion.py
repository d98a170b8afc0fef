"""What several operators of a program are together, for lowerings that have one kernel for it: an activation behind a layer,
gate and up, an RMS norm, a sum, a rotation."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.lower.siblings import Siblings

_ADD = torch.ops.aten.add.Tensor
_MUL = torch.ops.aten.mul.Tensor
_GELU = torch.ops.aten.gelu.default
_ACTIVATIONS = {
    torch.ops.aten.relu.default: "relu", torch.ops.aten.relu6.default: "relu6", torch.ops.aten.silu.default: "silu",
    torch.ops.aten.hardswish.default: "hardswish",
}  # fmt: skip
_BOUNDS = {torch.ops.aten.hardtanh.default: ("min_val", "max_val"), torch.ops.aten.clamp.default: ("min", "max")}
_TO = torch.ops.aten.to.dtype
_SLICE = torch.ops.aten.slice.Tensor
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
_END = 2**63 - 1


def activation_after(node: fx.Node, known: Collection[str]) -> tuple[str, fx.Node]:
    """The activation that alone reads `node`, as kernels name it, and its node; "none" and `node` itself where there is none
    or none of those that are `known`."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or not isinstance(user.target, torch._ops.OpOverload) or user.all_input_nodes != [node]:
        return "none", node
    name = _ACTIVATIONS.get(user.target)
    if user.target is _GELU:
        name = "gelu_tanh" if Call(user)["approximate"] == "tanh" else "gelu"
    elif user.target in _BOUNDS:
        low, high = (Call(user)[bound] for bound in _BOUNDS[user.target])
        name = "relu6" if (low, high) == (0, 6) else None
    return (name, user) if name in known else ("none", node)


@dataclass(frozen=True)
class GatedPair:
    """silu(gate) * up of two layers, positions in their group, that nothing else reads. result: the node of the product."""

    gate: int
    up: int
    result: fx.Node


def gated_pair(group: Siblings) -> GatedPair | None:
    if len(group.nodes) != 2 or group.sizes[0] != group.sizes[1]:
        return None
    for gate, up in ((0, 1), (1, 0)):
        name, silu = activation_after(group.nodes[gate], ("silu",))
        if name == "none" or len(silu.users) != 1 or len(group.nodes[up].users) != 1:
            continue
        (result,) = silu.users
        if result.target is _MUL and set(result.args) == {silu, group.nodes[up]}:
            return GatedPair(gate, up, result)
    return None


@dataclass(frozen=True)
class RmsNorm:
    """weight * (source / sqrt(mean(source^2) + eps)), rounded to source's dtype before the weight as Llama does."""

    source: fx.Node
    weight: fx.Node
    eps: float

    @property
    def columns(self) -> int:
        return self.weight.meta["val"].shape[0]


def match_rms_norm(node: fx.Node) -> RmsNorm | None:
    """The norm whose result `node` is."""
    if node.target is not _MUL or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    if not isinstance(node.meta["val"], Tensor):
        return None
    weight, normed = node.args if node.args[0].op == "get_attr" else reversed(node.args)
    dtype, columns = node.meta["val"].dtype, node.meta["val"].shape[-1]
    if weight.op != "get_attr" or weight.meta["val"].dtype != dtype or tuple(weight.meta["val"].shape) != (columns,):
        return None
    normed = _before_cast(normed, dtype)
    if normed.target is not _MUL or not all(isinstance(a, fx.Node) for a in normed.args):
        return None
    wide, inverse = normed.args
    source = _before_cast(wide, torch.float32)
    if wide.meta["val"].dtype != torch.float32 or source.meta["val"].dtype != dtype:
        return None
    if inverse.target is not torch.ops.aten.rsqrt.default:
        return None
    shifted = inverse.args[0]
    if shifted.target is not _ADD or shifted.kwargs or not isinstance(shifted.args[1], float):
        return None
    mean, eps = shifted.args
    if mean.target is not torch.ops.aten.mean.dim or mean.args[1:] != ([-1], True) or mean.kwargs:
        return None
    square = mean.args[0]
    if square.target is not torch.ops.aten.pow.Tensor_Scalar or square.args != (wide, 2):
        return None
    return RmsNorm(source, weight, eps)


def _before_cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node.args[0] if node.target is _TO and node.args[1:] == (dtype,) and not node.kwargs else node


def is_plain_sum(node: fx.Node) -> bool:
    """Whether `node` adds two tensors of its own shape and dtype."""
    if node.target is not _ADD or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    types = [each.meta["val"] for each in (node, *node.args)]
    return all(isinstance(t, Tensor) for t in types) and len({(str(t.dtype), *map(str, t.shape)) for t in types}) == 1


def insert_norm(
    program: Program, total: fx.Node, node: fx.Node, plain: tuple, with_sum: tuple, sum_at: int
) -> tuple[fx.Node, bool]:
    """(a call before `node`, a norm of `total`; whether it adds too). plain, with_sum: (operator, what follows `total`), and
    (operator, what follows the two that total is the sum of), which is taken where it is one. Then the call stands where the
    sum was, because what reads that may stand before the norm, and reads the call's result `sum_at`."""
    is_sum = is_plain_sum(total)
    place = {"before": total.next if is_sum else node, "by": "lower", "fqn": node.meta.get("fqn", "")}
    if not is_sum:
        return edit.insert(program, plain[0], (total, *plain[1:]), **place), False
    rest = [edit.read(program, each.target, total.next) if isinstance(each, fx.Node) else each for each in with_sum[1:]]
    made = edit.insert(program, with_sum[0], (*total.args, *rest), **place)
    edit.replace(total, edit.insert(program, operator.getitem, (made, sum_at), **place))
    return made, True


def match_rope(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) where `node` is x * cos + rotate_half(x) * sin of heads of an even width."""
    if not is_plain_sum(node) or any(each.target is not _MUL for each in node.args):
        return None
    if node.meta["val"].dtype not in (torch.float32, torch.bfloat16, torch.float16):  # kernels compute in float32
        return None
    for straight, turned in (node.args, reversed(node.args)):
        for rotated, sin in (turned.args, reversed(turned.args)):
            x = _rotated(rotated)
            if x is None or x not in straight.args:
                continue
            cos = straight.args[1] if straight.args[0] is x else straight.args[0]
            shape = [str(n) for n in x.meta["val"].shape]
            tables = [each.meta["val"] for each in (cos, sin) if isinstance(each, fx.Node)]
            if len(tables) == 2 and all(
                table.dtype == x.meta["val"].dtype and table.dim() == 4 and table.shape[1] == 1
                and str(table.shape[0]) in (shape[0], "1") and [str(n) for n in table.shape[2:]] == shape[2:]
                for table in tables
            ):  # fmt: skip
                return x, cos, sin
    return None


def _rotated(node: object) -> fx.Node | None:
    """x where `node` is [-second half, first half] of x [B, H, S, D]."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.cat.default or node.kwargs:
        return None
    parts, dim = node.args if len(node.args) == 2 else (node.args[0], 0)
    if len(parts) != 2 or dim not in (-1, 3) or parts[0].target is not torch.ops.aten.neg.default:
        return None
    second, first = parts[0].args[0], parts[1]
    if any(each.target is not _SLICE or each.kwargs or len(each.args) != 4 for each in (first, second)):
        return None
    x = first.args[0]
    width = x.meta["val"].shape[-1]
    if second.args[0] is not x or x.meta["val"].dim() != 4 or not isinstance(width, int) or width % 2:
        return None
    half = width // 2
    is_first = first.args[1] in (-1, 3) and first.args[2:] == (0, half)
    is_second = second.args[1] in (-1, 3) and second.args[2] == half and second.args[3] >= width
    return x if is_first and is_second else None


def repeated_heads(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """Of reshape(expand(unsqueeze(x, 2))), which repeats each head of x [B, KV, S, D] G times: (x, KV, G, D)."""
    if node.target not in _RESHAPES:
        return None
    expanded = node.args[0]
    if expanded.target is not torch.ops.aten.expand.default or len(expanded.args[1]) != 5:
        return None
    _, heads, group, _, width = expanded.args[1]
    _, all_heads, _, last = node.args[1] if len(node.args[1]) == 4 else (None,) * 4
    numbers = (heads, group, width, all_heads, last)
    if not all(isinstance(n, int) and n > 0 for n in numbers) or (all_heads, last) != (heads * group, width):
        return None
    unsqueezed = _without_full_slices(expanded.args[0])
    if unsqueezed.target is not torch.ops.aten.unsqueeze.default or unsqueezed.args[1] != 2:
        return None
    return _without_full_slices(unsqueezed.args[0]), heads, group, width


def _without_full_slices(node: fx.Node) -> fx.Node:
    while node.target is _SLICE and len(node.args) == 4 and node.args[2:] == (0, _END):
        node = node.args[0]
    return node
