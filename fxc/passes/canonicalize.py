"""One way to write each thing, so that the patterns of later passes are one node deep.

    constant @bias: f32[4]
    constant @weight: f32[8, 4]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 8] = aten.dropout(%0, 0.1, False)
    %2: f32[s0, 8] = aten.to.dtype(%1, f32)
    %3: f32[s0, 4] = aten.addmm(@bias, %2, @weight)  # up
    return "out" %3
    ---
    constant @bias: f32[4]
    constant @weight: f32[4, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 4] = aten.linear(%0, @weight, @bias)  # up (canonicalize)
    return "out" %1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxc.ir.edit import call, constant, insert, is_free, read, replace, sweep, type_of
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Result
from fxc.passes.facts import CANONICAL, SECOND_OPERAND, TRANSPOSES, factor, is_transposed_matrix
from fxc.passes.rewrites import Rewrites
from fxc.schemes import ops

aten = torch.ops.aten
_END = 2**62  # slices to the end are written with a bound above every size
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.to.other}
_COPIES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove what does nothing, merge what is computed twice, and write products with constant matrices as linears."""

    name: ClassVar[str] = "canonicalize"
    gives: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})

    def run(self, program: Program, context: Context) -> Result:
        changed, again = 0, True
        while again:
            before = len(context.rewrites.made)
            _apply_rules(program, context.rewrites)
            _merge_duplicates(program, context.rewrites)
            sweep(program)
            round_changed = len(context.rewrites.made) - before
            changed, again = changed + round_changed, round_changed > 0
        return Result(changed)


def _apply_rules(program: Program, rewrites: Rewrites) -> None:
    for node in list(program.graph.nodes):
        if rewrites.is_over:
            return
        if node.op == "call_function" and node.users and any(rule(program, node) for rule in _RULES.get(node.target, ())):
            rewrites.may(node.meta.get("fqn") or node.name)


def _drop(node: fx.Node) -> bool:
    """Let the users of `node` use its first argument, where that is the same value."""
    source = node.args[0]
    if type_of(source.meta["val"]) != type_of(node.meta["val"]):
        return False
    replace(node, source)
    return True


def _drop_cast(program: Program, node: fx.Node) -> bool:
    if _drop(node):
        return True
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return False
    call(program, aten.to.dtype, (node.args[0], node.meta["val"].dtype), replacing=node, by="canonicalize")
    return True


def _drop_same(program: Program, node: fx.Node) -> bool:
    return _drop(node)


def _drop_dropout(program: Program, node: fx.Node) -> bool:
    _, probability, training = node.args
    return (not training or probability == 0) and _drop(node)


def _drop_slice(program: Program, node: fx.Node) -> bool:
    _, _, start, end, step = (*node.args, *(None,) * 5)[:5]
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= _END)) and step in (None, 1)
    return whole and _drop(node)


def _drop_neutral(program: Program, node: fx.Node) -> bool:
    neutral = 1 if node.target in (aten.mul.Tensor, aten.div.Tensor) else 0
    alpha = node.kwargs.get("alpha", 1)
    return not isinstance(node.args[1], fx.Node) and node.args[1] == neutral and alpha == 1 and _drop(node)


def _apply_mask(program: Program, node: fx.Node) -> bool:
    """mul(@w_mask, @w_orig) -> @w: a mask that torch.nn.utils.prune left in place."""
    names = sorted(a.target for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    fqn = names[0].removesuffix("_mask") if names else ""
    if names != [f"{fqn}_mask", f"{fqn}_orig"]:
        return False
    mask, weight = (program.constants[name] for name in names)
    if weight.shape != mask.shape:
        return False
    masked, there = weight * mask, program.constants.get(fqn)
    if there is not None and torch.equal(there, masked):  # of a module that is called twice
        replace(node, read(program, fqn, before=node))
    elif is_free(program, fqn):
        replace(node, constant(program, fqn, masked, before=node))
    else:
        return False
    return True


def _view_to_reshape(program: Program, node: fx.Node) -> bool:
    if node.target is aten.reshape.default:
        return _drop(node) or _collapse(node)
    call(program, aten.reshape.default, node.args, replacing=node, by="canonicalize")
    return True


def _collapse(node: fx.Node) -> bool:
    """reshape(reshape(x)) -> reshape(x)"""
    source = node.args[0]
    if source.target is not aten.reshape.default or -1 in node.args[1]:
        return False
    node.args = (source.args[0], node.args[1])
    return True


def _fold_transpose(program: Program, node: fx.Node) -> bool:
    """A transposed weight that nothing reads as it is becomes a constant of its own shape."""
    source = node.args[0]
    if source.op != "get_attr" or program.constants[source.target].ndim != 2:
        return False
    if users_of(program, source.target) != [node] or all(factor(program, user) is node for user in node.users):
        return False
    fqn = source.target
    if is_transposed_matrix(program, node):
        _record_turned(program, fqn)
    program.constants[fqn] = node.target(program.constants[fqn], *node.args[1:]).contiguous()
    replace(node, read(program, fqn, before=node))
    program.graph.erase_node(node)
    program.graph.erase_node(source)
    return True


def _product_to_linear(program: Program, node: fx.Node) -> bool:
    """mm(x, t(@w)), matmul(x, t(@w)) -> linear(x, @w) and addmm(b, x, t(@w)) -> linear(x, @w, b), or
    beta * b + alpha * linear(x, @w) where b is no vector or there are factors. A constant that is not transposed in the
    graph and may be is first stored transposed under its own name."""
    matrix = factor(program, node)
    if matrix is None:
        return False
    if matrix.op == "get_attr":
        _store_transposed(program, matrix.target)
        matrix = node.args[SECOND_OPERAND[node.target]]
    weight = matrix.args[0]
    if node.target is not aten.addmm.default:
        call(program, aten.linear.default, (node.args[0], weight), replacing=node, by="canonicalize")
    else:
        _addmm_to_linear(program, node, weight)
    # Until the sweep it would count as a user of its arguments.
    program.graph.erase_node(node)
    return True


def _store_transposed(program: Program, fqn: str) -> None:
    """Turn the constant `fqn`, and let all who read it read the transpose of what is now stored."""
    _record_turned(program, fqn)
    program.constants[fqn] = program.constants[fqn].t().contiguous()
    for old in [n for n in program.graph.find_nodes(op="get_attr") if n.target == fqn]:
        turned = read(program, fqn, before=old)
        replace(old, insert(program, aten.t.default, (turned,), before=old, by="canonicalize", fqn=""))
        program.graph.erase_node(old)


def _record_turned(program: Program, fqn: str) -> None:
    """Keep in the metadata which constants are stored as the transpose of what the model has: an export turns them back."""
    turned = sorted({*program.metadata.pop("transposed", ())} ^ {fqn})
    program.metadata |= {"transposed": turned} if turned else {}


def _addmm_to_linear(program: Program, node: fx.Node, weight: fx.Node) -> None:
    bias, x = node.args[:2]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha == beta == 1 and tuple(bias.meta["val"].shape) == tuple(weight.meta["val"].shape[:1]):
        call(program, aten.linear.default, (x, weight, bias), replacing=node, by="canonicalize")
        return

    def then(target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        return insert(program, target, args, before=node, by="canonicalize", fqn=node.meta.get("fqn", ""), kwargs=kwargs)

    value = then(aten.linear.default, x, weight)
    if alpha != 1:
        value = then(aten.mul.Tensor, value, alpha)
    if beta != 0:  # the definition ignores a bias times 0, NaN included
        value = then(aten.add.Tensor, value, bias, **({"alpha": beta} if beta != 1 else {}))
    replace(node, value)


def _linear_of_flat_rows(program: Program, node: fx.Node) -> bool:
    """reshape(linear(reshape(x, [-1, K]))) -> linear(x), where only the last dimension of x has changed."""
    rows = node.args[0]
    if rows.target is not aten.reshape.default:
        return False
    x = rows.args[0]
    leading = [str(s) for s in x.meta["val"].shape[:-1]]
    width = str(node.meta["val"].shape[-1])
    if str(x.meta["val"].shape[-1]) != str(rows.meta["val"].shape[-1]) or len(leading) == rows.meta["val"].ndim - 1:
        return False
    users = list(node.users)
    if any(u.target is not aten.reshape.default or [str(s) for s in u.meta["val"].shape] != [*leading, width] for u in users):
        return False
    wide = insert(program, aten.linear.default, (x, *node.args[1:]), before=node, by="canonicalize", fqn=node.meta["fqn"])
    for user in users:
        replace(user, wide)
    return True


def _grouped_to_linear(program: Program, node: fx.Node) -> bool:
    """grouped_mm(x, transpose(@w), offsets) -> grouped_linear(x, @w, offsets)"""
    x, weight, offsets = node.args
    if weight.target is not aten.transpose.int or {d % 3 for d in weight.args[1:]} != {1, 2}:
        return False
    call(program, ops.GROUPED_LINEAR, (x, weight.args[0], offsets), replacing=node, by="canonicalize")
    return True


def _merge_duplicates(program: Program, rewrites: Rewrites) -> None:
    """Common subexpression elimination. What is random is never the same twice."""
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and type_of(first.meta["val"]) == type_of(node.meta["val"]):
            if not rewrites.may(node.meta.get("fqn") or node.name):
                return
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)


def _key(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _key(v)) for k, v in sorted(argument.items()))
    # 1, 1.0 and True are equal and not the same argument.
    return argument if isinstance(argument, fx.Node) else (type(argument), repr(argument))


_RULES: dict[Any, tuple[Callable[[Program, fx.Node], bool], ...]] = {
    **dict.fromkeys(_CASTS, (_drop_cast,)),
    **dict.fromkeys(_COPIES, (_drop_same,)),
    **dict.fromkeys(_DROPOUTS, (_drop_dropout,)),
    **dict.fromkeys(_RESHAPES, (_view_to_reshape,)),
    **dict.fromkeys(TRANSPOSES, (_fold_transpose,)),
    aten.slice.Tensor: (_drop_slice,),
    aten.expand.default: (_drop_same,),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor), (_drop_neutral,)),
    aten.mul.Tensor: (_drop_neutral, _apply_mask),
    **dict.fromkeys(SECOND_OPERAND, (_product_to_linear,)),
    aten.linear.default: (_linear_of_flat_rows,),
    ops.GROUPED_MM: (_grouped_to_linear,),
}
