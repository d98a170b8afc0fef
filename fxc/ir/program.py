"""Program: what fxc rewrites. A flat FX graph, the constants beside it, and how it is called.

The graph holds four kinds of node. A `placeholder` is one input tensor. A `get_attr` names a constant by the model's own
name for it (its FQN). A `call_function` calls an operator admitted by `fxc.ir.targets`. The `output` returns a flat tuple.
Every value's type is in `node.meta["val"]`: a FakeTensor, a SymInt, or a tuple of them.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxc.ir.store import Constants

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""Names end up in the Python code that torch.fx generates to run a graph, so that a quote or a bracket in one would be code."""


_MODULE = nn.Module()


def is_name(fqn: str) -> bool:
    """Whether `fqn` may name a constant: dotted parts of letters, digits, _ and -, none of them an attribute of modules."""
    return bool(_NAME.fullmatch(fqn)) and not any(hasattr(_MODULE, part) for part in fqn.split("."))


@dataclass(frozen=True)
class Input:
    """One input tensor. `default` says what to pass when the caller leaves it out: "ones:x" and "zeros:x" have the shape
    of input x, "empty:x" is a cache [B, heads, 0, width] with as many rows as x; None means that the caller must give it."""

    name: str
    default: str | None = None


@dataclass
class Signature:
    """How the flat program is called. `call` and `result` are JSON structures over indices into inputs and outputs:
    {"args": [...], "kwargs": {...}} and nestings of {"list": [...]}, {"tuple": [...]}, {"dict": {...}},
    {"class": "module:Name", "dict": {...}}, {"value": constant} and plain integers."""

    inputs: list[Input]
    outputs: list[str]
    call: Any
    result: Any


@dataclass
class Program:
    """A captured model.

    graph: nodes in execution order; constants: FQN -> tensor, one entry for a group of tied weights, possibly on meta,
    or in files (`fxc.ir.store`);
    aliases: each other name of a tied weight -> its FQN in `constants`; metadata: small JSON facts about the source.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    aliases: dict[str, str]
    signature: Signature
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        from fxc.ir.text import print_program

        return print_program(self)

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> list[fx.Node]:
        """The nodes returned, in the order of `signature.outputs`."""
        return list(self.graph.output_node().args[0])

    @property
    def is_on_meta(self) -> bool:
        """True when some constant has a shape and a dtype but no values, so that the program can be planned, not run."""
        return any(t.is_meta for t in self.constants.values())

    def copy(self) -> Program:
        """An independent graph over the same constant tensors."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        return Program(
            graph, self.constants.copy(), dict(self.aliases), copy.deepcopy(self.signature), copy.deepcopy(self.metadata)
        )

    def graph_on(self, device: torch.device | str) -> fx.Graph:
        """A copy of the graph in which what makes a tensor makes it on `device`."""
        graph, device = self.copy().graph, torch.device(device)
        for node in graph.nodes:
            node.args = _move_devices(node.args, device)
            node.kwargs = _move_devices(node.kwargs, device)
        return graph

    def module(self, device: torch.device | str | None = None) -> fx.GraphModule:
        """A runnable module: flat input tensors positionally, a flat tuple of tensors back. Its constants share memory
        with the program's unless `device` asks for a copy elsewhere."""
        graph = self.copy().graph if device is None else self.graph_on(device)
        # Numbered, constants collide with nothing that a GraphModule has, and each is read in one step, where every dot of its
        # name would cost a microsecond a call.
        names = {name: f"constant_{number}" for number, name in enumerate(self.constants)}
        for node in graph.find_nodes(op="get_attr"):
            node.target = names[node.target]
        root = {names[name]: t if device is None else t.to(device) for name, t in self.constants.items()}
        return fx.GraphModule(root, graph, class_name="Program").eval().requires_grad_(False)

    @property
    def is_streamed(self) -> bool:
        """Whether it is read piece by piece: its constants are in files, which is for models that are larger than memory."""
        return isinstance(self.constants, Constants)

    @property
    def is_stored_coded(self) -> bool:
        """Whether artifacts hold its constants coded (`fxc.artifact.coding`): smaller, and expanded when they are loaded."""
        return self.metadata.get("storage") == "coded"

    def nbytes(self) -> int:
        """Bytes of the constants; a tied weight counts once."""
        return sum(t.numel() * t.element_size() for t in self.constants.values())

    def numel(self) -> int:
        """Numbers in the constants; a tied weight counts once."""
        return sum(t.numel() for t in self.constants.values())


def _move_devices(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, torch.device):
        return device
    if isinstance(argument, (list, tuple)):
        return type(argument)(_move_devices(a, device) for a in argument)
    if isinstance(argument, dict):
        return {k: _move_devices(v, device) for k, v in argument.items()}
    return argument


def users_of(program: Program, fqn: str) -> list[fx.Node]:
    """The nodes that read the constant `fqn`."""
    nodes = program.graph.find_nodes(op="get_attr")
    return [user for node in nodes if node.target == fqn for user in node.users]
