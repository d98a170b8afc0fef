"""The hidden states of samples as they flow through a program, from block to block.

Of each sample what later nodes will read is kept, and nothing else; what samples have in common, as masks and rotary tables, is
kept once.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxc.calibrate.journal import Spill
from fxc.ir.program import Program

State = dict[fx.Node, Any]


class Stream:
    """states: of each sample, the values of nodes of `program` from which all that follows can be computed; of its inputs to
    begin with."""

    def __init__(self, program: Program, samples: Sequence[Sequence[Tensor]]) -> None:
        self.program = program
        self.states: list[State] | Spilled = [dict(zip(program.placeholders, sample, strict=True)) for sample in samples]

    def reader(self, wanted: Iterable[fx.Node]) -> Callable[[State], State]:
        """What computes the values of the nodes `wanted` from one of `states`; others are freed after their last use."""
        return reader(self.program, wanted, self.states[0] if self.states else ())

    def flow(self, after: fx.Node, beside: Stream | None = None) -> None:
        """Replace the states of all samples by the values that `after` and what follows will read. beside: a stream that is
        there already; what is equal in both is kept once."""
        for at, state in enumerate(self._after(after, beside)):
            self.states[at] = state

    def flow_to_disk(self, after: fx.Node, beside: Stream | None, into: Spill, in_memory: bool) -> None:
        """`flow`, with the states written one by one. Where they are not kept in memory too, `from_disk` is to take them."""
        first = None
        for at, state in enumerate(self._after(after, beside)):
            first = state if first is None else first
            into.add(_written(state, first if at else None))
            if in_memory:
                self.states[at] = state

    def from_disk(self, path: Path, offsets: Sequence[int], in_memory: bool) -> None:
        """The states that were written to a file, from then on. in_memory: all at once, or each when it is asked for."""
        states = Spilled(path, offsets, {node.name: node for node in self.program.graph.nodes})
        self.states = list(states) if in_memory else states

    def rename(self, old: fx.Node, new: fx.Node) -> None:
        """What was the value of `old` is that of `new`."""
        if isinstance(self.states, Spilled):
            self.states.rename(old, new)
            return
        for state in self.states:
            state[new] = state.pop(old)

    def _after(self, after: fx.Node, beside: Stream | None) -> Iterator[State]:
        read = self.reader(alive_before(self.program, after))
        common = list(beside.states[0].values()) if beside and beside.states else []
        for at, state in enumerate(self.states):
            values = {node: _kept_once(value, common) for node, value in read(state).items()}
            if at == 0:
                common += values.values()
            yield values


class Spilled(Sequence[State]):
    """States in a file, read when they are asked for. What a sample has in common with the first one is kept in memory."""

    def __init__(self, path: Path, offsets: Sequence[int], nodes: dict[str, fx.Node]) -> None:
        self._path, self._offsets, self._nodes = path, offsets, nodes
        self._first: dict[str, Any] = self._load(0)["values"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, at: int) -> State:
        values = self._first
        if at != 0:
            found = self._load(at)
            values = found["values"] | {name: self._first[first] for name, first in found["as_first"].items()}
        return {self._nodes[name]: value for name, value in values.items()}

    def __iter__(self) -> Iterator[State]:
        return map(self.__getitem__, range(len(self)))

    def rename(self, old: fx.Node, new: fx.Node) -> None:
        self._nodes = {name: new if node is old else node for name, node in self._nodes.items()}

    def _load(self, at: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._offsets[at])
            data = file.read(self._offsets[at + 1] - self._offsets[at])
        return torch.load(io.BytesIO(data), weights_only=True)


def _written(state: State, first: State | None) -> dict[str, Any]:
    """What a file keeps of a state: values by the names of nodes, and the names of those that the first state has."""
    names = {id(value): node.name for node, value in (first or {}).items() if isinstance(value, Tensor)}
    as_first = {node.name: names[id(value)] for node, value in state.items() if id(value) in names}
    return {"values": {n.name: value for n, value in state.items() if n.name not in as_first}, "as_first": as_first}


@dataclass(frozen=True)
class Passage:
    """A block as it was before it was compressed.

    program: the uncompressed one; nodes: the block's, of it; count: of samples; outputs: the nodes of what the block gives;
    reads: of a sample what the block is given now, behind blocks that are compressed, by nodes of `program`; gave: the values
    of `outputs` in the uncompressed program; batch: the symbol of the size of a batch in the shapes of `program`, if samples
    are to be computed together.
    """

    program: Program
    nodes: Sequence[fx.Node]
    count: int
    outputs: Sequence[fx.Node]
    reads: Callable[[int], State]
    gave: Callable[[int], Sequence[Tensor]]
    batch: Any = None

    def together(self, some: Sequence[int]) -> Iterator[tuple[State, Sequence[Tensor]]]:
        """What `reads` and `gave` say of samples, in as few states as can be."""
        states, aims = [self.reads(at) for at in some], [self.gave(at) for at in some]
        whole = stacked(states, self.batch) if self.batch is not None and len(some) > 1 else None
        if whole is None:
            yield from zip(states, aims, strict=True)
        else:
            yield whole, [torch.cat(each) for each in zip(*aims, strict=True)]

    @property
    def own(self) -> set[str]:
        """The constants that the block reads, and nothing else does."""
        inside = set(self.nodes)
        users: dict[str, list[fx.Node]] = {}
        for node in self.program.graph.find_nodes(op="get_attr"):
            users.setdefault(node.target, []).extend(node.users)
        return {name for name, some in users.items() if some and all(user in inside for user in some)}


def alive_before(program: Program, after: fx.Node) -> list[fx.Node]:
    """The values made before `after` that are read by it or later, other than to be returned. Constants are read anew."""
    nodes = list(program.graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    end = place[after]
    made = (node for node in nodes[:end] if node.op != "get_attr")
    return [node for node in made if any(place[user] >= end and user.op != "output" for user in node.users)]


def stacked(states: Sequence[State], batch: Any) -> State | None:
    """The states of samples as that of one batch, by where the symbol `batch` stands in shapes; None where that does not say,
    or sizes differ."""
    made = {}
    for node, first in states[0].items():
        values = [state[node] for state in states]
        # A weight in another dtype has no type of its own.
        is_weight = all(each.op == "get_attr" for each in node.all_input_nodes) and "val" not in node.meta
        kind = False if is_weight else _stands(node.meta.get("val", ()), batch)
        if kind is None or any(type(each) is not type(first) for each in values):
            return None
        if not kind:
            same = all(torch.equal(first, each) if isinstance(first, Tensor) else first == each for each in values[1:])
            made[node] = first
        elif isinstance(first, Tensor):
            same = all(each.shape[1:] == first.shape[1:] for each in values)
            made[node] = torch.cat(values) if same else first
        else:
            same, made[node] = True, sum(values)
        if not same:
            return None
    return made


def _stands(value: Any, batch: Any) -> bool | None:
    """Whether the first dimension of `value`, or a number itself, is the size of the batch; None where that is in it
    otherwise."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    if isinstance(value, tuple | list):
        return None
    found = [each for each in sizes if not isinstance(each, int | float | bool) and batch in each.node.expr.free_symbols]
    if not found:
        return False
    return True if len(found) == 1 and found[0] is sizes[0] and found[0].node.expr == batch else None


def _kept_once(value: Any, others: Iterable[Any]) -> Any:
    """The one of `others` that is equal to it, if there is one."""
    if not isinstance(value, Tensor):
        return value
    tensors = (each for each in others if isinstance(each, Tensor) and each.dtype == value.dtype)
    return next((each for each in tensors if torch.equal(value, each)), value)


def _called(node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return node.target(*args, **kwargs)


def reader(
    program: Program,
    wanted: Iterable[fx.Node],
    known: Collection[fx.Node],
    call: Callable[[fx.Node, tuple, dict], Any] = _called,
) -> Callable[..., State]:
    """What computes the values of the nodes `wanted` from a state that has those of `known`, which all samples' have alike, and
    perhaps other tensors for some constants, by name; values are freed after their last use. call: what a node gives."""
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

    def read(state: State, constants: Mapping[str, Tensor] | None = None) -> State:
        values, others = dict(state), constants or {}
        for node in order:
            if node.op == "get_attr":
                values[node] = others[node.target] if node.target in others else program.constants[node.target]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = call(node, args, kwargs)
            for each in ending.get(node, ()):
                del values[each]
        return {node: values[node] for node in wanted}

    return read
