"""The numbered blocks of a network, what they change of their input, and how to take one out.

A block is a module whose name ends in a number ("layers.3") and that turns one value into another of the same type. Where a
number within a number is one, the outer is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from fxc.errors import UsageError
from fxc.ir.cache import is_present
from fxc.ir.edit import insert, replace, sweep, type_of
from fxc.ir.observe import observe
from fxc.ir.program import Program

aten = torch.ops.aten
_AROUND_RESIDUALS = (aten.add.Tensor, aten.layer_norm.default, aten.rms_norm.default, aten.relu.default)


@dataclass(frozen=True)
class Block:
    """`exit` is computed in the module `scope` from `entry`, and nothing else that depends on `entry` leaves it."""

    scope: str
    entry: fx.Node
    exit: fx.Node


def blocks(program: Program) -> tuple[list[Block], dict[str, str]]:
    """The blocks in the order of the graph, and for numbered modules that are none: why."""
    found: list[Block] = []
    why: dict[str, str] = {}
    for scope in _numbered(program):
        if any(scope.startswith(f"{b.scope}.") for b in found):
            continue
        block = block_at(program, scope)
        if isinstance(block, Block):
            found.append(block)
        else:
            why[scope] = block
    return found, why


def others(program: Program, keep: Sequence[int]) -> list[str]:
    """The layers of the network but those with the numbers `keep`. Raises UsageError for a number that no layer has, for a
    network with several lists of layers, and where none would go."""
    found, why = blocks(program)
    lists = Counter(block.scope.rpartition(".")[0] for block in found)
    if len(lists) != 1:
        said = f"{len(lists)} lists of layers: {', '.join(lists)}" if lists else "no layers that can be dropped"
        hint = "name those that go: prune:drop=MODULE;MODULE" if lists else None
        raise UsageError(f"the model has {said}", where="keep", why=next(iter(why.values()), None), hint=hint)
    numbers = {int(block.scope.rpartition(".")[2]): block.scope for block in found}
    if missing := [each for each in keep if each not in numbers]:
        raise UsageError(f"there is no layer {missing[0]}", where="keep", hint=f"the layers of the model: {listed(numbers)}")
    if numbers.keys() <= set(keep):
        raise UsageError(f"these are all of its {len(numbers)} layers", where="keep", hint="leave some out")
    return [scope for number, scope in numbers.items() if number not in keep]


def listed(numbers: Iterable[int]) -> str:
    """0 to 4, or each of them where some are missing."""
    ordered = sorted(numbers)
    is_whole = ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 2
    return f"{ordered[0]} to {ordered[-1]}" if is_whole else ", ".join(map(str, ordered))


def _numbered(program: Program) -> list[str]:
    """Module names that end in a number, outer ones first."""
    scopes: dict[str, None] = {}
    for node in program.graph.nodes:
        parts = (node.meta.get("fqn") or "").split(".")
        for end, part in enumerate(parts, 1):
            if part.isdecimal():
                scopes[".".join(parts[:end])] = None
    return sorted(scopes, key=lambda s: s.count("."))


def block_at(program: Program, scope: str) -> Block | str:
    """The block that the module `scope` is, or why it is none."""
    inside = [n for n in program.graph.nodes if n.op == "call_function" and _within(n, scope)]
    if not inside:
        return "no operator of the graph belongs to it"
    members = set(inside)
    sources = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in members and n.op != "get_attr")
    caches = _cache_outputs(program)
    found = []
    for entry in sources:
        value = entry.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        reached = {entry}
        for node in inside:
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        exits = [
            n
            for n in inside
            if n in reached and any(u not in members and (u.op != "output" or n not in caches) for u in n.users)
        ]
        if len(exits) == 1 and type_of(exits[0].meta["val"]) == type_of(value):
            found.append(Block(scope, entry, exits[0]))
    if len(found) == 1:
        return found[0]
    return "it turns no one value into another of the same shape" if not found else "several values could be its input"


def _within(node: fx.Node, scope: str) -> bool:
    fqn = node.meta.get("fqn") or ""
    return fqn == scope or fqn.startswith(f"{scope}.")


def _cache_outputs(program: Program) -> set[fx.Node]:
    return {r for name, r in zip(program.signature.outputs, program.results) if is_present(name)}


def take_out(program: Program, block: Block) -> None:
    """Remove what the block does: one that adds to its input becomes its input, and a branch without a residual of its own
    becomes zero."""
    if _has_residual(block):
        block.exit.replace_all_uses_with(block.entry)
    else:
        before = next(n for n in program.graph.nodes if n in block.exit.users)
        fqn = block.scope
        zero = insert(program, aten.zeros_like.default, (block.entry,), before=before, by="prune", fqn=fqn)
        replace(block.exit, zero)
    sweep(program)


def _has_residual(block: Block) -> bool:
    """Whether sums and norms lead from the exit back to the entry."""
    todo, seen = [block.exit], set()
    while todo:
        node = todo.pop()
        if node is block.entry:
            return True
        if node not in seen and node.target in _AROUND_RESIDUALS:
            seen.add(node)
            todo += [a for a in node.args[:2] if isinstance(a, fx.Node)]
    return False


def influence(program: Program, found: Sequence[Block], samples: Iterable[Sequence[Tensor]]) -> dict[Block, float]:
    """How much each block changes its input: 1 - the mean cosine of the two (Men et al. 2024, block influence). What enters a
    block is kept until it leaves it, and no longer."""
    sums: Counter[Block] = Counter()
    counts: Counter[Block] = Counter()
    entering: dict[str, Tensor] = {}

    def watch(value: Tensor, name: str) -> None:
        for block in found:
            if block.exit.name == name:
                before, after = entering[block.entry.name].double(), value.double()
                # Of images the channels come second, of tokens last.
                cosine = torch.nn.functional.cosine_similarity(before, after, dim=1 if after.ndim == 4 else -1)
                sums[block] += cosine.sum().item()
                counts[block] += cosine.numel()
                waiting[block.entry.name] -= 1
        if waiting[name] > 0:
            entering[name] = value
        for each in [each for each in entering if not waiting[each]]:
            del entering[each]

    module, ends = program.module(), {node.name for block in found for node in (block.entry, block.exit)}
    for inputs in samples:
        waiting = Counter(block.entry.name for block in found)
        with torch.no_grad():
            observe(module, inputs, {name: partial(watch, name=name) for name in ends})
    return {b: 1 - sums[b] / counts[b] for b in found}
