"""The few mutations that passes may make. Each keeps types, FQNs and provenance right, or fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc.ir.infer import fake_constant, fake_mode_of, infer
from fxc.ir.program import Program


def constant(program: Program, fqn: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """Add the constant `fqn` and a node that reads it, placed before the node `before`."""
    if fqn in program.constants or fqn in program.aliases:
        raise ValueError(f"the program already has a constant {fqn}")
    program.constants[fqn] = tensor
    return read(program, fqn, before)


def is_free(program: Program, name: str, but: str | None = None) -> bool:
    """Whether no constant except for `but`, which will go, has this name, lies in a module of it or is one around it."""
    others = (fqn for fqn in program.constants if fqn != but)
    return name not in program.aliases and not any(
        fqn == name or fqn.startswith(f"{name}.") or name.startswith(f"{fqn}.") for fqn in others
    )


def free_name(program: Program, name: str) -> str:
    """`name`, or `name_2`, `name_3`, ... where it is taken."""
    candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    return next(each for each in candidates if is_free(program, each))


def read(program: Program, fqn: str, before: fx.Node) -> fx.Node:
    """A node that reads the existing constant `fqn`, placed before the node `before`."""
    with program.graph.inserting_before(before):
        node = program.graph.create_node("get_attr", fqn)
    node.meta["val"] = fake_constant(fake_mode_of(program.graph), program.constants[fqn])
    return node


def call(program: Program, target: Any, args: tuple, *, replacing: fx.Node, by: str, kwargs: dict | None = None) -> fx.Node:
    """Put `target(*args)` in the place of the node `replacing`. Every user of the old node uses the new one, which must
    have the old one's shape and dtype; the old node is left without users, for `sweep` to remove. The name of the old node
    is kept in `meta["replaces"]`, so that the two can be compared."""
    node = insert(program, target, args, before=replacing, by=by, fqn=replacing.meta.get("fqn", ""), kwargs=kwargs)
    replace(replacing, node)
    node.meta["replaces"] = replacing.name
    return node


def insert(
    program: Program, target: Any, args: tuple, *, before: fx.Node, by: str, fqn: str, kwargs: dict | None = None
) -> fx.Node:
    """Add a call before the node `before`, its type inferred, marked as made by the pass `by` for the module `fqn`."""
    with program.graph.inserting_before(before):
        node = program.graph.call_function(target, args, kwargs or {})
    node.meta["val"] = infer(fake_mode_of(program.graph), target, args, kwargs or {})
    node.meta["fqn"], node.meta["by"] = fqn, by
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` use `new`, which must be of the same type."""
    before, after = old.meta["val"], new.meta["val"]
    if type_of(before) != type_of(after):
        raise TypeError(f"{old} is {type_of(before)}, so {new}, which is {type_of(after)}, cannot replace it")
    old.replace_all_uses_with(new)


def type_of(value: Any) -> Any:
    """What two values must share to stand for each other: dtype and shape, or the symbolic number."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(str(s) for s in value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(type_of(v) for v in value)
    return str(value)


def retype(program: Program, mode: FakeTensorMode, inputs: Sequence[Tensor]) -> None:
    """Infer all types anew from those of the inputs, fake tensors of `mode`."""
    for node, value in zip(program.placeholders, inputs, strict=True):
        node.meta["val"] = value
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = fake_constant(mode, program.constants[node.target])
        elif node.op == "call_function":
            node.meta["val"] = infer(mode, node.target, node.args, node.kwargs)


def sweep(program: Program) -> int:
    """Remove nodes that nothing uses and constants that nothing reads, tied names included. Returns how many nodes went.
    Every operator in a program is pure, so that a node without users is dead."""
    removed = 0
    for node in reversed(program.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            program.graph.erase_node(node)
            removed += 1
    live = {node.target for node in program.graph.find_nodes(op="get_attr")}
    for fqn in program.constants.keys() - live:
        del program.constants[fqn]
    program.aliases = {alias: fqn for alias, fqn in program.aliases.items() if fqn in live}
    return removed
