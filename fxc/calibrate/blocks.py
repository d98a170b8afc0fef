"""Where a program can be cut so that between two blocks little is kept, and which layers a block holds, in what order.

A block ends where one tensor is alive (the residual stream), besides what blocks share. Shared is what needs no layer to be
computed (the inputs, masks, rotary tables), a value that is read in three blocks or more (what an encoder gave to a decoder's
blocks), and one that waits for long (what a first tower gave). Nothing else is known of the model: a decoder is cut after each
attention and each feed-forward part, a plain chain of layers after each layer, and what cannot be cut is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from fxc.ir.names import weight_of
from fxc.ir.program import Program
from fxc.schemes.scheme import scheme_of

# A value that is read at so many places, with layers between them, is one that blocks share: a residual tensor is read at two,
# where a block begins and where it ends.
READERS = 3
# Or one past which so many layers run one by one without reading it: within a block there are fewer.
WAITING = 6


@dataclass(frozen=True)
class Block:
    """nodes: what it computes, in order; enters, leaves: the tensor at its begin and end, None at those of the program;
    reads: whatever it reads from outside, in order (`enters`, shared values, inputs; no constants);
    groups: its layers in the order in which they run, those together that read the same value."""

    nodes: list[fx.Node]
    enters: fx.Node | None
    leaves: fx.Node | None
    reads: list[fx.Node]
    groups: list[list[fx.Node]]


def blocks(program: Program, packed: bool = False) -> list[Block]:
    """The blocks of `program`, each with at least one layer: a call that reads a float constant of two dimensions or more,
    and something else. The experts of a mixture are layers once the program is canonical. packed: what reads a packed weight is
    a layer too."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    position = {node: at for at, node in enumerate(nodes)}
    layers = {node for node in nodes if _is_layer(program, node) or (packed and scheme_of(node.target) is not None)}
    # Of each value that a cut can go through, where it is made and read: those that a layer has a part in.
    uses: dict[fx.Node, list[int]] = {}
    for node in nodes:
        if node in layers or any(each in uses for each in node.all_input_nodes):
            uses[node] = sorted(position[user] for user in node.users if user.op == "call_function")
    spans = {node: used for node, used in uses.items() if used and _has_tensors(node)}
    alive = _alive(spans, position, len(nodes))
    shared: set[fx.Node] = set()
    places = sorted(position[node] for node in layers)
    while found := _shared_one(spans, places, alive, shared):
        shared.add(found)
    ends = {at: next(iter(left)) for at, values in enumerate(alive) if len(left := values - shared) == 1}
    made, begin, enters = [], 0, None
    for first, after in zip(places, [*places[1:], None]):
        cuts = [at for at in ends if after is not None and first <= at < after]
        if cuts:
            # What follows a layer by itself, such as an activation or a norm, goes with it.
            end = max(cuts)
            made.append(_block(nodes[begin : end + 1], enters, ends[end], layers))
            begin, enters = end + 1, ends[end]
    return [*made, _block(nodes[begin:], enters, None, layers)] if layers else []


def _is_layer(program: Program, node: fx.Node) -> bool:
    weight = weight_of(program, node)
    return weight is not None and program.constants[weight].is_floating_point() and _input_of(node) is not None


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta["val"]
    return any(isinstance(each, Tensor) for each in (value if isinstance(value, tuple | list) else (value,)))


def _alive(spans: dict[fx.Node, list[int]], position: dict[fx.Node, int], count: int) -> list[set[fx.Node]]:
    """Of each node's position, the values that are read after it and made by then."""
    ending: dict[int, list[fx.Node]] = {}
    for node, used in spans.items():
        ending.setdefault(used[-1], []).append(node)
    making = {position[node]: node for node in spans}
    alive: list[set[fx.Node]] = []
    now: set[fx.Node] = set()
    for at in range(count):
        now = now | {making[at]} if at in making else now
        now = now - set(ending.get(at, ()))
        alive.append(now)
    return alive


def _shared_one(
    spans: dict[fx.Node, list[int]], layers: list[int], alive: list[set[fx.Node]], shared: set[fx.Node]
) -> fx.Node | None:
    """Of the values not known to be shared, the one without which there could be most cuts."""
    cuts: dict[fx.Node, list[int]] = {}
    for at, values in enumerate(alive):
        left = values - shared
        if len(left) == 2:
            for value in left:
                cuts.setdefault(value, []).append(at)
    most, best = 0, None
    for value, between in cuts.items():
        readers, waited = 0, 0
        for before, after in pairwise([between[0] - 1, *spans[value]]):
            cut = [at for at in between if before <= at < after]
            # A layer that reads the value is none that runs past it.
            past = [layer for layer in layers if before < layer < after]
            readers += before < spans[value][0] or bool(cut and past)
            waited = max(waited, sum(any(first <= at < then for at in cut) for first, then in pairwise(past)))
        if (readers >= READERS or waited >= WAITING) and len(between) > most:
            most, best = len(between), value
    return best


def _block(nodes: list[fx.Node], enters: fx.Node | None, leaves: fx.Node | None, layers: set[fx.Node]) -> Block:
    inside = set(nodes)
    reads = dict.fromkeys(
        each for node in nodes for each in node.all_input_nodes if each not in inside and each.op != "get_attr"
    )
    groups: dict[fx.Node | None, list[fx.Node]] = {}
    for node in nodes:
        if node in layers:
            groups.setdefault(_input_of(node), []).append(node)
    return Block(nodes, enters, leaves, list(reads), list(groups.values()))


def _input_of(layer: fx.Node) -> fx.Node | None:
    """The first tensor that a layer reads besides constants."""
    return next((each for each in layer.all_input_nodes if each.op != "get_attr" and _has_tensors(each)), None)
