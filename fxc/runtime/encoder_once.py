"""The lowered program of an encoder with a decoder as two, so that generation runs the encoder once.

What depends on inputs of the encoder alone is the first part; what the second needs of it, its `memory`, are results of the
first and inputs of the second: keys and values of the decoder's attention to what the encoder made, mostly. Every tensor of
the memory has the batch first, so that beams may repeat it. The rest that the second part needs of the encoder's inputs
(masks that are made of them, sizes) it makes again, of these inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.errors import UsageError
from fxc.ir import edit
from fxc.ir.cache import is_of_encoder
from fxc.ir.check import check
from fxc.ir.program import Input, Program

MEMORY = "memory."
Places = dict[str, tuple[fx.Node, int]]
_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Halves:
    """encoder: the encoder's inputs -> those outputs of the whole that need no others, and the memory. decoder: some of the
    encoder's inputs, the others and the memory -> the other outputs. Both share the constants of the whole."""

    encoder: Program
    decoder: Program


def halves(lowered: Program) -> Halves:
    """The two parts of `lowered`, which is not changed. Raises `UsageError` where a weight of the encoder would be read in
    every step of the decoder."""
    whole = lowered.copy()
    given = dict(zip(whole.placeholders, (declared.name for declared in whole.signature.inputs), strict=True))
    of_encoder = [node for node, name in given.items() if is_of_encoder(name)]
    of_decoder = [node for node in given if node not in of_encoder]
    sizes = [node.meta["val"].shape[0] for node in given if node.meta["val"].ndim]
    batches = {str(size) for size in sizes if not isinstance(size, int)}
    made = _made(whole, of_encoder, _symbols(of_encoder) | batches, batches)

    places = _places([*of_decoder, *of_encoder], batches)
    memory = _memory(whole, made, set(of_encoder), batches, places)
    results = dict(zip(whole.signature.outputs, whole.results, strict=True))
    kept = {name: node for name, node in results.items() if node in made}
    memory_names = {node: f"{MEMORY}{number}" for number, node in enumerate(memory)}
    encoder = _with_results(whole, kept | {n: node for node, n in memory_names.items()}, {}, _places(of_encoder, batches))
    rest = {name: node for name, node in results.items() if name not in kept}
    decoder = _with_results(whole, rest, memory_names, places)
    return Halves(encoder, decoder)


def _made(whole: Program, of_encoder: list[fx.Node], known: set[str], batches: set[str]) -> set[fx.Node]:
    """The nodes that depend on inputs of the encoder and on no other. A size depends on none if it is of the batch, wherever
    the graph reads it, and on the encoder's alone if its symbols are `known`."""
    reads: dict[fx.Node, set[bool]] = {}  # True: of the encoder, False: of the decoder
    for node in whole.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            reads[node] = {node in of_encoder}
        elif isinstance(value, torch.SymInt):
            reads[node] = {str(each) in known for each in value.node.expr.free_symbols if str(each) not in batches}
        else:
            reads[node] = set().union(*(reads[each] for each in node.all_input_nodes))
    return {node for node, kinds in reads.items() if kinds == {True}}


def _symbols(placeholders: list[fx.Node]) -> set[str]:
    sizes = (size for node in placeholders for size in node.meta["val"].shape if isinstance(size, torch.SymInt))
    return {str(each) for size in sizes for each in size.node.expr.free_symbols}


def _memory(
    whole: Program, made: set[fx.Node], inputs: set[fx.Node], batches: set[str], places: Places
) -> list[fx.Node]:
    """What the decoder reads of the nodes in `made` and does not make again, in the order of the graph. What asks for a size
    that is in `places` reads nothing else."""
    found: set[fx.Node] = set()
    again: set[fx.Node] = set()
    readers = (node for node in whole.graph.nodes if node.op == "call_function" and node not in made)
    waiting = [each for node in readers if _place(node, places) is None for each in node.all_input_nodes if each in made]
    while waiting:
        node = waiting.pop()
        if node in found or node in again or node in inputs or node not in made or _place(node, places):
            continue
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.ndim and str(value.shape[0]) in batches:
            found.add(node)
            continue
        again.add(node)
        waiting += node.all_input_nodes
    for node in again:
        if weights := [n.target for n in node.all_input_nodes if n.op == "get_attr" and n.meta["val"].ndim > 1]:
            raise UsageError(
                f"the decoder would have to compute {node} of the encoder in every step",
                where=node.meta.get("fqn") or weights[0],
                why=f"its first dimension is not the batch, and it reads {weights[0]}",
                hint="call the model without generate(): it runs as a whole",
            )
    return [node for node in whole.graph.nodes if node in found]


def _places(inputs: list[fx.Node], batches: set[str]) -> Places:
    """Size -> the first of `inputs` that has it, and its dimension there; all sizes in `batches` are one."""
    places: Places = {}
    for node in inputs:
        for dimension, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int):
                places.setdefault(str(size), (node, dimension))
    return places | {size: (inputs[0], 0) for size in batches}


def _place(node: fx.Node, places: Places) -> tuple[fx.Node, int] | None:
    """Where the size that `node` asks for is read, if it asks for one."""
    return places.get(str(node.meta["val"])) if node.target is _SIZE else None


def _with_results(
    whole: Program, results: dict[str, fx.Node], given: dict[fx.Node, str], places: Places
) -> Program:
    """The part of `whole` that gives `results`, names to nodes, where the nodes in `given` are inputs of these names, and sizes
    are read in their `places`."""
    index = {node: number for number, node in enumerate(whole.graph.nodes)}
    part = whole.copy()
    nodes = list(part.graph.nodes)
    part.graph.output_node().args = (tuple(nodes[index[node]] for node in results.values()),)
    inputs = dict(zip(part.placeholders, part.signature.inputs, strict=True))
    last = list(inputs)[-1]
    for node, name in given.items():
        made = nodes[index[node]]
        with part.graph.inserting_after(last):
            last = part.graph.placeholder(name.replace(".", "_"))
        last.meta = {"val": made.meta["val"], "fqn": "", "by": "lower"}
        made.replace_all_uses_with(last)
        inputs[last] = Input(name)
    for asks in nodes:
        if place := _place(asks, places):
            asks.args = (nodes[index[place[0]]], place[1])
    edit.sweep(part)
    for node in list(inputs):
        if not node.users:
            part.graph.erase_node(node)
            del inputs[node]
    part.signature.inputs, part.signature.outputs = list(inputs.values()), list(results)
    part.signature.call = {"args": list(range(len(inputs))), "kwargs": {}}
    part.signature.result = {"tuple": list(range(len(results)))}
    check(part, lowered=True)
    return part
