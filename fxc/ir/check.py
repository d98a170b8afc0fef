"""Structural invariants of a program: what must hold before and after every pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from fxc.errors import VerificationFailed
from fxc.ir.program import Program, is_name
from fxc.ir.targets import refusal
from fxc.ir.text import excerpt


def check(program: Program, lowered: bool = False) -> None:
    """Raise `VerificationFailed`, naming the node, unless the program is well formed: the graph is acyclic and typed, calls
    only admitted operators, reads only constants that exist and are used, and returns as many values as it says.

    lowered: it may call operators of a device too.
    """
    problem = next(_problems(program, lowered), None)
    if problem:
        where, what = problem
        shown = excerpt(program, where)
        raise VerificationFailed(
            what,
            where=where.target if getattr(where, "op", None) == "get_attr" else where,
            why="the program breaks a structural rule of the IR",
            excerpt=shown,
        )


def _problems(program: Program, lowered: bool) -> Iterator[tuple[fx.Node | str, str]]:
    """Each with where it is: a node, the name of a constant, or a part of the signature."""
    computed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if late := [each for each in node.all_input_nodes if each not in computed]:
            yield node, f"it reads {late[0]}, which is not computed before it"
        computed.add(node)
    program.graph.lint()
    read = set()
    for node in program.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None:
            yield node, "the node has no type"
        if node.op == "get_attr":
            tensor = program.constants.get(node.target)
            if tensor is None:
                yield next(iter(node.users), node), f"the graph reads the constant {node.target}, which is not in the store"
            elif (tensor.shape, tensor.dtype) != (tuple(node.meta["val"].shape), node.meta["val"].dtype):
                yield (
                    node,
                    f"the constant is {tensor.dtype}{list(tensor.shape)}, the graph says {node.meta['val']}",
                )
            read.add(node.target)
        elif node.op == "call_function":
            if reason := refusal(node.target, lowered):
                yield node, reason
        elif node.op not in ("placeholder", "output"):
            yield node, f"nodes of the kind {node.op} are not allowed"
    for fqn in program.constants.keys() - read:
        yield fqn, "the constant is in the store and nothing reads it"
    for fqn in program.constants:
        if not is_name(fqn):
            yield fqn, "the constant has a name with other characters than letters, digits, '_', '-' and '.'"
    for alias, fqn in program.aliases.items():
        if fqn not in program.constants or alias in program.constants:
            yield alias, f"the tied name does not stand for a constant of the store ({fqn})"
    if len(program.placeholders) != len(program.signature.inputs):
        yield "inputs", f"{len(program.placeholders)} in the graph, {len(program.signature.inputs)} in the signature"
    if len(program.results) != len(program.signature.outputs):
        yield "outputs", f"{len(program.results)} in the graph, {len(program.signature.outputs)} in the signature"
    if not all(isinstance(n.meta["val"], Tensor) for n in program.placeholders):
        yield "inputs", "an input is not a tensor"
