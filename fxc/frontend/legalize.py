"""Make an exported graph pure: assertions go, an in-place operator becomes the functional one, foreign operators become fxc's.

A program's operators neither mutate nor have effects (`fxc.ir.targets`), which is what makes every later rewrite simple.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import OpOverload

from fxc.errors import CaptureFailed
from fxc.ir.infer import fake_mode_of, infer
from fxc.ir.targets import refusal
from fxc.schemes import ops

# Checks of what was traced, and markers without a value.
_EFFECTS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
# The same values in the same memory, and what is in place only in the bookkeeping of gradients.
_IDENTITIES = {"detach_", "requires_grad_", "alias", "detach", "lift_fresh"}


# A program reads no memory that nobody wrote.
_FILLED = {
    "aten::empty_like": torch.ops.aten.zeros_like.default,
    "aten::new_empty": torch.ops.aten.new_zeros.default,
    "aten::empty": torch.ops.aten.zeros.default,
}
# What functionalization and decomposition leave: the public operator that computes the same. The "unsafe" ones only
# promise autograd that nobody writes through them, which nobody does in a program.
_PUBLIC = {
    "aten::_unsafe_view": torch.ops.aten.view.default,
    "aten::lift_fresh_copy": torch.ops.aten.clone.default,
    "aten::_unsafe_index.Tensor": torch.ops.aten.index.Tensor,
    "aten::unsafe_split.Tensor": torch.ops.aten.split.Tensor,
    "aten::unsafe_split_with_sizes": torch.ops.aten.split_with_sizes.default,
    "aten::unsafe_chunk": torch.ops.aten.chunk.default,
}
_FOREIGN = {"transformers::grouped_mm_fallback": ops.GROUPED_MM}


def legalize(graph: fx.Graph) -> None:
    """Rewrite `graph` in place. Raises `CaptureFailed`, naming the operator and the module, for what cannot be made pure."""
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        schema = node.target._schema
        short = schema.name.split("::")[1]
        if short in _EFFECTS:
            graph.erase_node(node)
        elif short in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif (public := _PUBLIC.get(f"{schema.name}.{schema.overload_name}".rstrip("."))) is not None:
            node.target = public
        elif schema.name in _FOREIGN:
            node.target = _FOREIGN[schema.name]
        elif schema.name in _FILLED:
            node.target = _FILLED[schema.name]
        elif schema.is_mutable:
            _make_functional(graph, node)
    for node in graph.nodes:
        _say_dtype(node)
        if node.op == "call_function" and (reason := refusal(node.target)):
            raise CaptureFailed(
                reason,
                where=node.meta.get("fqn") or str(node),
                hint="compile the model without that module, or replace it by one written with public torch operators",
            )


def _say_dtype(node: fx.Node) -> None:
    """Write into a call that makes a tensor of no other which type it makes, where the process's default type decides."""
    if isinstance(node.target, OpOverload) and node.kwargs.get("dtype") is None:
        value = node.meta.get("val")
        if any(isinstance(each.meta.get("val"), torch.Tensor) for each in node.all_input_nodes):
            return
        names = {argument.name for argument in node.target._schema.arguments if argument.kwarg_only}
        if "dtype" in names and isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            node.kwargs = node.kwargs | {"dtype": value.dtype}


def _make_functional(graph: fx.Graph, node: fx.Node) -> None:
    """`add_(x, y)` -> `add(x, y)`, where later readers of x read the result instead."""
    name, overload = node.target._schema.name.split("::")[1], node.target._overloadname
    functional = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or functional is None or not isinstance(node.args[0], fx.Node):
        raise _impure(node, "it writes to its arguments and has no functional form")
    written = node.args[0]
    order = {n: i for i, n in enumerate(graph.nodes)}
    for other in _aliases(written) - {node}:
        if other.op != "call_function":
            raise _impure(node, f"it writes to {'an input' if other.op == 'placeholder' else 'a weight'} of the model")
        if other is not written and any(order[user] > order[node] for user in other.users):
            raise _impure(node, "it writes to memory that is read later through another view")
    with graph.inserting_before(node):
        result = graph.call_function(functional, node.args, node.kwargs)
        result.meta = dict(node.meta)
        result.meta["val"] = infer(fake_mode_of(graph), functional, node.args, node.kwargs)
        dtype = written.meta["val"].dtype
        if result.meta["val"].dtype != dtype:  # what is written takes the type of where it is written
            result = graph.call_function(torch.ops.aten.to.dtype, (result, dtype))
            result.meta = dict(node.meta)
    later = {user for user in written.users if order.get(user, -1) > order[node]}
    written.replace_all_uses_with(result, delete_user_cb=later.__contains__)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Every value that may share memory with `node`, itself included."""
    found, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        if _returns_view(current):
            todo.append(current.args[0])
        todo.extend(user for user in current.users if _returns_view(user) and user.args[0] is current)
    return found


def _returns_view(node: fx.Node) -> bool:
    """Whether the node's value may share memory with its first argument: a view, views, or one of several views."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        return _returns_view(node.args[0])
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return any(argument.alias_info is not None for argument in node.target._schema.arguments)


def _impure(node: fx.Node, why: str) -> CaptureFailed:
    return CaptureFailed(
        f"{node.target} cannot be made free of side effects",
        where=node.meta.get("fqn") or str(node),
        why=why,
        hint="write that line without the in-place operation",
    )
