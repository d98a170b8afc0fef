"""Watch a program run: what chosen nodes compute, and, where that is asked for, something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxc.ir.program import Program

Watch = Callable[[Any], Any]
"""Is given the value of a node. What it returns, unless that is None, takes the place of the value from there on."""


class _Observer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watches: Mapping[str, Watch]):
        super().__init__(module)
        self.watches = watches
        self.at: str | None = None

    def run_node(self, node: fx.Node) -> Any:
        self.at = node.name
        value = super().run_node(node)
        watch = self.watches.get(node.name)
        if watch is None:
            return value
        other = watch(value)
        return value if other is None else other


class _Streamed(fx.Interpreter):
    def __init__(self, program: Program):
        super().__init__(torch.nn.Module(), graph=program.graph)
        self._constants = program.constants

    def fetch_attr(self, target: str) -> Tensor:
        return self._constants[target]


def run(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The program's outputs on the CPU, by its operators' own definitions. Of one that is larger than memory constants are read
    where they are used, and let go."""
    with torch.no_grad():
        return _Streamed(program).run(*inputs) if program.is_streamed else program.module()(*inputs)


def observe(module: fx.GraphModule, inputs: Sequence[Tensor], watches: Mapping[str, Watch]) -> tuple[Tensor, ...]:
    """Run `module` (`Program.module()`, or one lowered) node by node; returns its outputs.

    watches: name of a node -> what to do with its value. Every value is freed after its last use, so that the memory needed is
    that of an ordinary run and of what the watches keep. Gradients, dtypes and devices are as in an ordinary call.
    """
    return _Observer(module, watches).run(*inputs)


def inputs_of(layers: Iterable[fx.Node], each: Callable[[fx.Node, Tensor], Tensor | None]) -> dict[str, Watch]:
    """What to give `observe` to see what layers read: `each` gets the node of the layer and its first argument, x [*, K]. What
    it returns, unless that is None, is what all that read x get from there on: x.detach().requires_grad_(), say, of which
    gradients can be asked then.

    In the program's own dtypes, or in float64 where the program is `fxc.passes.float64.in_float64` of it, which has nodes of
    the same names, and the inputs are `widened`.
    """
    readers: dict[str, list[fx.Node]] = {}
    for node in layers:
        readers.setdefault(node.args[0].name, []).append(node)

    def watch(value: Tensor, nodes: list[fx.Node]) -> Tensor:
        for node in nodes:
            other = each(node, value)
            value = value if other is None else other
        return value

    return {name: partial(watch, nodes=nodes) for name, nodes in readers.items()}


def stops_at(module: fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """The name of the node at which `module` breaks off on these inputs; None where it runs to its end."""
    observer = _Observer(module, {})
    try:
        with torch.no_grad():
            observer.run(*inputs)
    except Exception:  # whatever an operator raises
        return observer.at
    return None


def values_at(module: fx.GraphModule, inputs: Sequence[Tensor], names: Collection[str]) -> dict[str, Any]:
    """The values of the nodes `names` in one run of `module`."""
    values: dict[str, Any] = {}
    observe(module, inputs, {name: lambda value, name=name: values.update({name: value}) for name in names})
    return values
