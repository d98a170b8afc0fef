"""From an exported module to one flat graph: no regions, one placeholder an input, a flat tuple returned."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxc.errors import CaptureFailed
from fxc.ir.infer import fake_mode_of


def flat_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The exported module's graph with one placeholder an input and a flat tuple returned, regions inlined; and the
    tensors that it reads, by FQN."""
    graph, constants = fx.Graph(), {}
    mapping: dict[fx.Node, Any] = {}

    def copy(source: fx.GraphModule, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = _attribute(source, node.target)
            if isinstance(value, fx.GraphModule):
                return
            name = node.target.removeprefix("m.") if source is module else f"{node.target}"
            constants[name] = value
            mapping[node] = graph.create_node("get_attr", name)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            mapping[node] = _inline(source, node, mapping, copy)
        else:
            args, kwargs = _substitute(node.args, mapping), _substitute(node.kwargs, mapping)
            if node.target is operator.getitem and isinstance(args[0], (list, tuple)):
                mapping[node] = args[0][args[1]]  # a result of an inlined region
                return
            mapping[node] = graph.call_function(node.target, args, kwargs)
        if isinstance(mapping[node], fx.Node):
            mapping[node].meta = {"val": node.meta.get("val"), "fqn": _module_of(node), "by": ""}

    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, node in enumerate(placeholders):
        mapping[node] = graph.placeholder(f"input_{index}")
        mapping[node].meta = {"val": node.meta["val"], "fqn": "", "by": ""}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copy(module, node)
    results, _ = torch.utils._pytree.tree_flatten(_substitute(module.graph.output_node().args[0], mapping))
    graph.output(tuple(results))
    return graph, constants


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _substitute(argument: Any, mapping: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return mapping[argument]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_substitute(a, mapping) for a in argument)
    if isinstance(argument, dict):
        return {k: _substitute(v, mapping) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_substitute(a, mapping) for a in (argument.start, argument.stop, argument.step)))
    # A program is neutral to the device: lowering puts the target's in.
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _inline(source: fx.GraphModule, node: fx.Node, mapping: dict, copy: Any) -> Any:
    """The results of a region that only sets a mode (no gradients, autocast off), its nodes copied in place."""
    name = str(node.target)
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        raise CaptureFailed(f"the model uses the control-flow operator {name}", hint="rewrite that part without it")
    if name == "wrap_with_autocast" and node.args[2] is not False and node.args[2] is not None and node.args[2]:
        raise CaptureFailed("the model runs a part under autocast", hint="capture it in the wanted dtype: dtype=...")
    region_node = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    region = _attribute(source, region_node.target)
    operands = node.args[node.args.index(region_node) + 1 :]
    inner = [n for n in region.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(inner, operands, strict=True):
        mapping[placeholder] = mapping[operand]
    for inside in region.graph.nodes:
        if inside.op not in ("placeholder", "output"):
            copy(region, inside)
    return _substitute(region.graph.output_node().args[0], mapping)


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("m").removeprefix(".") if path == "m" or path.startswith("m.") else path


def unstack(graph: fx.Graph, stacks: list[list[int]]) -> None:
    """Give the graph a placeholder for each tensor of the cache in place of the stacked ones."""
    stacked = graph.find_nodes(op="placeholder")[-len(stacks) :]
    placeholders: dict[int, fx.Node] = {}
    mode = fake_mode_of(graph)
    for stack, whole in zip(stacks, stacked, strict=True):
        (unbound,) = (user for user in whole.users if user.target is torch.ops.aten.unbind.int)
        for item in list(unbound.users):
            value = item.meta["val"]
            with graph.inserting_before(whole):
                index = stack[item.args[1]]
                node = placeholders[index] = graph.placeholder(f"past_{index}")
            with mode:
                node.meta = {"val": torch.empty(value.shape, dtype=value.dtype, device="cpu"), "fqn": "", "by": ""}
            item.replace_all_uses_with(node)
            graph.erase_node(item)
        graph.erase_node(unbound)
        for user in list(whole.users):  # what is left asks for the sizes of the stack
            user.args = (placeholders[stack[0]], user.args[1] - 1)
        graph.erase_node(whole)
    for before, index in zip(sorted(placeholders), sorted(placeholders)[1:]):
        placeholders[before].append(placeholders[index])
