"""Layers that read the same activation, as one: what lowering for any device looks for first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxc.ir.names import layer_of
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
class Group:
    """Layers of one operator and format that read the same activation: one product serves all of them.

    arguments: of each node, constants as tensors; bias: of all of them together, float32; sizes: the outputs of each.
    """

    target: object
    nodes: list[fx.Node]
    arguments: list[tuple]
    bias: Tensor | None
    sizes: list[int]
    columns: int
    names: list[str]

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


def together(tensors: list[Tensor | None]) -> Tensor | None:
    """The tensors one after the other; None for layers that have none."""
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def find_groups(
    graph: fx.Graph, attributes: Mapping[str, Tensor | nn.Module], targets: Collection[object]
) -> list[Group]:
    """The calls of `targets` in `graph`, whose constants are `attributes`."""
    found: dict[tuple, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in targets:
            continue
        if not all(a.op == "get_attr" for a in node.args[1:] if isinstance(a, fx.Node)):
            continue  # a bias that is computed: the operator itself can run that
        found.setdefault((node.args[0], node.target, _layout(node)), []).append(node)
    return [_group(attributes, target, nodes) for (_, target, _), nodes in found.items()]


def _layout(node: fx.Node) -> tuple:
    """One kernel reads weights with the same parts and numbers, as the size of int4's groups."""
    given = product_of(node.target).arguments(node.args)
    return tuple(isinstance(a, fx.Node) or a for name, a in given.items() if name != "bias")


def _group(attributes: Mapping[str, Tensor | nn.Module], target: object, nodes: list[fx.Node]) -> Group:
    arguments = [
        tuple(attributes[a.target] if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args)
        for node in nodes
    ]
    sizes = [args[1].shape[0] for args in arguments]
    biases = [product_of(target).arguments(args).get("bias") for args in arguments]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([torch.zeros(size) if b is None else b.float() for b, size in zip(biases, sizes)])
    names = [layer_of(node, node.args[1].target) for node in nodes]
    return Group(target, nodes, arguments, bias, sizes, nodes[0].args[0].meta["val"].shape[-1], names)


def replace(graph: fx.Graph, group: Group, out: fx.Node) -> None:
    """`out`, which is in the graph before the group's nodes, is their results one after the other."""
    parts = [out]
    if len(group.nodes) > 1:
        starts = [sum(group.sizes[:i]) for i in range(len(group.sizes))]
        with graph.inserting_before(group.nodes[0]):
            parts = [graph.call_function(torch.narrow, (out, -1, start, size)) for start, size in zip(starts, group.sizes)]
    for node, part in zip(group.nodes, parts):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def relax_views(graph: fx.Graph) -> None:
    """Slices of one product are not contiguous, so what was a view may have to copy."""
    for target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = torch.ops.aten.reshape.default


def module_of(graph: fx.Graph, attributes: Mapping[str, Tensor | nn.Module], class_name: str) -> fx.GraphModule:
    """`graph` with those of its `attributes` that it uses, runnable."""
    root = {}
    for node in graph.nodes:
        if node.op == "call_module":
            root[node.target] = attributes[node.target]
        elif node.op == "get_attr":
            # Under a name of their own, constants cannot collide with what a GraphModule has besides.
            value, node.target = attributes[node.target], f"constants.{node.target}"
            root[node.target] = value
    return fx.GraphModule(root, graph, class_name=class_name).eval().requires_grad_(False)


def dynamic_dims(graph: fx.Graph) -> list[frozenset[int]]:
    """Of each input, the dimensions whose size may change between calls."""
    shapes = [node.meta["val"].shape for node in graph.find_nodes(op="placeholder")]
    return [frozenset(d for d, n in enumerate(shape) if not isinstance(n, int)) for shape in shapes]
