"""Take out whole branches: what is a constant is put in for what computed it, and what no result needs goes.

%9:  f32[s0, 64] = aten.linear(%8, @o.weight)     (all columns of @o.weight are zero)
%10: f32[s0, 64] = aten.add.Tensor(%4, %9)         ->  %4
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxc.analysis.constants import Known
from fxc.ir.cache import cache_pairs
from fxc.ir.edit import constant, free_name, sweep, type_of
from fxc.ir.program import Program

aten = torch.ops.aten
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_BROADCASTING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def replace_constants(program: Program, known: dict[fx.Node, Known]) -> int:
    """Where a value that the inputs led to is known through and through, let those who combine it with another value read a
    constant, and where it is zero in a sum leave it out. Returns how many uses were replaced."""
    varies: set[fx.Node] = set()
    replaced = 0
    for node in list(program.graph.nodes):
        if node.op == "placeholder" or any(n in varies for n in node.all_input_nodes):
            varies.add(node)
        if node not in varies or node not in known or not known[node].is_complete:
            continue
        is_zero = not known[node].values.any()
        for user in list(node.users):
            # A result that is known through and through is replaced where it is used, or is what the program gives.
            leaves_out = is_zero and user.target in _SUMS
            is_inner = user in known and known[user].is_complete and not leaves_out
            if user.target in _BROADCASTING and not is_inner:
                replaced += _combine(program, user, node, known[node])
    return replaced


def _combine(program: Program, user: fx.Node, node: fx.Node, known: Known) -> bool:
    """Rewrite `user`, which combines `node` with another value of the shape that the result has."""
    others = [a for a in user.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    other = others[0]
    if type_of(other.meta["val"]) != type_of(user.meta["val"]):
        return False
    is_first = user.args[0] is node
    if user.target in _SUMS and not known.values.any() and not (is_first and user.target is aten.sub.Tensor):
        if is_first and user.kwargs.get("alpha", 1) != 1:
            return False
        user.replace_all_uses_with(other)
        return True
    values = known.values
    while values.ndim and values.shape[0] == 1:
        values = values[0]
    fqn = node.meta.get("fqn") or node.name
    new = constant(program, free_name(program, f"{fqn}.constant"), values.clone(), before=user)
    user.replace_input_with(node, new)
    return True


def drop_dead_cache(program: Program) -> list[str]:
    """Remove the keys and values of the layers that no result needs. Returns the names of the inputs that went."""
    pairs = cache_pairs(program)
    if not pairs:
        return []
    placeholders, results = program.placeholders, program.results
    pasts = {placeholders[i] for i, _ in pairs.values()}
    cached = {o for _, o in pairs.values()}
    needed = _needed([r for o, r in enumerate(results) if o not in cached])
    layers: dict[str, list[str]] = {}
    for name in pairs:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    dead = [name for its in layers.values() if not any(placeholders[pairs[n][0]] in needed for n in its) for name in its]
    if len(dead) == len(pairs) or not _measure_elsewhere(program, pasts & needed, {placeholders[pairs[n][0]] for n in dead}):
        return []
    if dead:
        inputs, outputs = {pairs[n][0] for n in dead}, {pairs[n][1] for n in dead}
        program.graph.output_node().args = (tuple(r for o, r in enumerate(results) if o not in outputs),)
        names = [program.signature.inputs[i].name for i in sorted(inputs)]
        sweep(program)
        for i in sorted(inputs):
            program.graph.erase_node(placeholders[i])
        _drop(program, inputs, outputs)
        return names
    return []


def _needed(results: list[fx.Node]) -> set[fx.Node]:
    """What `results` are computed from; measuring a size of a value does not need the value."""
    needed, todo = set(), list(results)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            if node.target is not aten.sym_size.int:
                todo += node.all_input_nodes
    return needed


def _measure_elsewhere(program: Program, alive: set[fx.Node], dead: set[fx.Node]) -> bool:
    """Let sizes that are read off `dead` inputs be read off others. Whether that was possible for all."""
    moves: list[tuple[fx.Node, tuple[Any, ...]]] = []
    for node in program.graph.nodes:
        if node.target is aten.sym_size.int and node.args[0] in dead:
            wanted = str(node.meta["val"])
            places = (
                (p, d)
                for p in program.placeholders
                if p in alive
                for d, s in enumerate(p.meta["val"].shape)
                if str(s) == wanted
            )
            place = next(places, None)
            if place is None:
                return False
            moves.append((node, place))
    for node, place in moves:
        node.args = place
    return True


def _drop(program: Program, inputs: set[int], outputs: set[int]) -> None:
    signature = program.signature
    numbers = [[i for i in range(len(items)) if i not in gone] for items, gone in
               ((signature.inputs, inputs), (signature.outputs, outputs))]  # fmt: skip
    signature.call = _renumbered(signature.call, {old: new for new, old in enumerate(numbers[0])})
    signature.result = _renumbered(signature.result, {old: new for new, old in enumerate(numbers[1])})
    signature.inputs = [signature.inputs[i] for i in numbers[0]]
    signature.outputs = [signature.outputs[i] for i in numbers[1]]


def _renumbered(structure: Any, numbers: dict[int, int]) -> Any:
    """A JSON structure over indices without those that are not in `numbers`."""
    if isinstance(structure, int):
        return numbers[structure]
    if isinstance(structure, list):
        return [_renumbered(s, numbers) for s in structure if not isinstance(s, int) or s in numbers]
    if "value" in structure:
        return structure
    return {
        k: v if k == "class" else _renumbered(v, numbers)
        for k, v in structure.items()
        if isinstance(v, str) or not isinstance(v, int) or v in numbers
    }
