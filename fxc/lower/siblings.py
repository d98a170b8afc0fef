"""Layers that read the same activation, as one: what lowering for any device looks for first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.names import layer_of
from fxc.ir.program import Program
from fxc.schemes.scheme import product_of, scheme_of


@dataclass(frozen=True)
class LayerChoice:
    """How one layer was lowered. fqn: its name; op: the form chosen; reason: why, with numbers when it was measured."""

    fqn: str
    op: str
    reason: str
    out_features: int
    in_features: int


@dataclass
class Siblings:
    """Layers of one operator and format that read the same activation: one product serves all of them.

    arguments: of each node, constants as tensors; bias: of all of them together, float32; sizes: the outputs of each; kept:
    what was made of their weights and is needed again.
    """

    target: object
    nodes: list[fx.Node]
    arguments: list[tuple]
    bias: Tensor | None
    sizes: list[int]
    columns: int
    names: list[str]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> fx.Node:
        return self.nodes[0].args[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.meta["val"].dtype

    @property
    def is_empty(self) -> bool:
        return sum(self.sizes) * self.columns == 0

    def argument(self, position: int) -> Tensor | None:
        """The constants at `position` of all of the layers, as one."""
        return together([args[position] for args in self.arguments])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights of all of them as numbers, [N, K]."""
        scheme, product = scheme_of(self.target), product_of(self.target)
        return together([scheme.dense(product.arguments(args)).to(dtype) for args in self.arguments])

    def choices(self, op: str, reason: str) -> list[LayerChoice]:
        if len(self.nodes) > 1:
            reason += f"; one product with {', '.join(self.names)}"
        return [LayerChoice(name, op, reason, size, self.columns) for name, size in zip(self.names, self.sizes)]


@dataclass(frozen=True)
class Place:
    """Where lowering writes what runs a group: before the node `before`, over constants in the module `name`."""

    program: Program
    before: fx.Node
    name: str

    def constant(self, part: str, value: Tensor | None) -> fx.Node | None:
        return None if value is None else edit.constant(self.program, f"{self.name}.{part}", value, self.before)

    def call(self, target: object, args: tuple, group: Siblings) -> fx.Node:
        return edit.insert(self.program, target, args, before=self.before, by="lower", fqn=", ".join(group.names))


def together(tensors: list[Tensor | None]) -> Tensor | None:
    """The tensors one after the other; None for layers that have none."""
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def find_siblings(program: Program, targets: Collection[object]) -> list[Siblings]:
    """The calls of `targets` whose other arguments are constants."""
    found: dict[tuple, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in targets:
            continue
        if not all(a.op == "get_attr" for a in node.args[1:] if isinstance(a, fx.Node)):
            continue  # a bias that is computed: the operator itself can run that
        found.setdefault((node.args[0], node.target, _layout(node)), []).append(node)
    return [_group(program, target, nodes) for (_, target, _), nodes in found.items()]


def _layout(node: fx.Node) -> tuple:
    """One kernel reads weights with the same parts and numbers, as the size of int4's groups."""
    given = product_of(node.target).arguments(node.args)
    return tuple(isinstance(a, fx.Node) or a for name, a in given.items() if name != "bias")


def _group(program: Program, target: object, nodes: list[fx.Node]) -> Siblings:
    arguments = [
        tuple(program.constants[a.target] if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args)
        for node in nodes
    ]
    sizes = [args[1].shape[0] for args in arguments]
    biases = [product_of(target).arguments(args).get("bias") for args in arguments]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([torch.zeros(size) if b is None else b.float() for b, size in zip(biases, sizes)])
    names = [layer_of(node, node.args[1].target) for node in nodes]
    return Siblings(target, nodes, arguments, bias, sizes, nodes[0].args[0].meta["val"].shape[-1], names)


def replace(program: Program, group: Siblings, out: fx.Node) -> None:
    """`out`, which is in the graph before the group's nodes, is their results one after the other."""
    parts, first = [out], group.nodes[0]
    if len(group.nodes) > 1:
        starts = [sum(group.sizes[:i]) for i in range(len(group.sizes))]
        parts = [
            edit.insert(program, torch.ops.aten.narrow.default, (out, -1, start, size), before=first, by="lower", fqn=name)
            for start, size, name in zip(starts, group.sizes, group.names)
        ]
    for node, part in zip(group.nodes, parts):
        edit.replace(node, part)
    edit.sweep(program)


def relax_views(program: Program) -> None:
    """Slices of one product are not contiguous, so what was a view may have to copy."""
    for target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        for node in program.graph.find_nodes(op="call_function", target=target):
            node.target = torch.ops.aten.reshape.default


def module_name(program: Program, layer: str) -> str:
    """Where constants go that lowering makes for `layer`."""
    return edit.free_name(program, f"lowered.{layer}" if layer else "lowered.layer")
