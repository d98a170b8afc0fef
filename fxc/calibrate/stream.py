"""The hidden states of samples as they flow through a program, from block to block.

Of each sample what later nodes will read is kept, and nothing else; what samples have in common, as masks and rotary tables, is
kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxc.ir.program import Program

State = dict[fx.Node, Any]


class Stream:
    """states: of each sample, the values of nodes of `program` from which all that follows can be computed; of its inputs to
    begin with."""

    def __init__(self, program: Program, samples: Sequence[Sequence[Tensor]]) -> None:
        self.program = program
        self.states: list[State] = [dict(zip(program.placeholders, sample, strict=True)) for sample in samples]

    def reader(self, wanted: Iterable[fx.Node]) -> Callable[[State], State]:
        """What computes the values of the nodes `wanted` from one of `states`; others are freed after their last use."""
        return _reader(self.program, wanted, self.states[0] if self.states else ())

    def flow(self, after: fx.Node, beside: Stream | None = None) -> None:
        """Replace the states of all samples by the values that `after` and what follows will read. beside: a stream that is
        there already; what is equal in both is kept once."""
        read = self.reader(alive_before(self.program, after))
        common = list(beside.states[0].values()) if beside and beside.states else []
        for at, state in enumerate(self.states):
            values = {node: _kept_once(value, common) for node, value in read(state).items()}
            self.states[at] = values
            if at == 0:
                common += values.values()


def alive_before(program: Program, after: fx.Node) -> list[fx.Node]:
    """The values made before `after` that are read by it or later, other than to be returned. Constants are read anew."""
    nodes = list(program.graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    end = place[after]
    made = (node for node in nodes[:end] if node.op != "get_attr")
    return [node for node in made if any(place[user] >= end and user.op != "output" for user in node.users)]


def _kept_once(value: Any, others: Iterable[Any]) -> Any:
    """The one of `others` that is equal to it, if there is one."""
    if not isinstance(value, Tensor):
        return value
    tensors = (each for each in others if isinstance(each, Tensor) and each.dtype == value.dtype)
    return next((each for each in tensors if torch.equal(value, each)), value)


def _reader(program: Program, wanted: Iterable[fx.Node], known: Collection[fx.Node]) -> Callable[[State], State]:
    """What computes the values of the nodes `wanted` from a state that has those of `known`, which all samples' have alike;
    others are freed after their last use."""
    wanted = list(dict.fromkeys(wanted))
    path, todo = set(), list(wanted)
    while todo:
        node = todo.pop()
        if node not in path and node not in known:
            path.add(node)
            todo += node.all_input_nodes
    order = [node for node in program.graph.nodes if node in path]
    last = {each: node for node in order for each in node.all_input_nodes}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for each, node in last.items():
        if each not in wanted:
            ending.setdefault(node, []).append(each)

    def read(state: State) -> State:
        values = dict(state)
        for node in order:
            if node.op == "get_attr":
                values[node] = program.constants[node.target]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
            for each in ending.get(node, ()):
                del values[each]
        return {node: values[node] for node in wanted}

    return read
