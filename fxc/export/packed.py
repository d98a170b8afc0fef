"""The packed weights of a program by the names that the model has for them, and the program as if they were float.

An export asks where each weight goes in the model (`configuration.describe`) and what it is packed as (`Packed`): the numbers
and scales that it writes are those of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxc.errors import UsageError
from fxc.ir.names import layer_of, parts_of
from fxc.ir.program import Program
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import Product, Scheme, product_of, scheme_of


@dataclass(frozen=True)
class Packed:
    """One weight of a format. layer: what users call it; readers: the nodes that multiply by it or look it up; parts: qweight,
    scale, ... as stored; shape: [N, K], or [experts, N, K]; dtype: what it is computed in."""

    layer: str
    scheme: Scheme
    readers: tuple[fx.Node, ...]
    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def product(self) -> Product:
        """That of the first node that reads it."""
        return product_of(self.readers[0].target)

    def argument(self, name: str) -> Any:
        """An argument of the first node that reads it: group, x_scale, ..."""
        return self.product.arguments(self.readers[0].args)[name]

    def dense(self) -> Tensor:
        """The numbers that it stands for, float32."""
        if len(self.shape) == 4:
            return self.scheme.dense({**self.parts, self.scheme.numbers: self.parts[self.scheme.numbers].flatten(1)}).view(
                self.shape
            )
        return self.scheme.dense({part: self.parts.get(part) for part in self.scheme.parts})


def packed_weights(program: Program) -> dict[str, Packed]:
    """Name of the weight as the model has it (layer.weight, or the name of experts) -> what it is packed as."""
    found: dict[str, Packed] = {}
    for node in program.graph.nodes:
        scheme = scheme_of(node.target)
        if scheme is None:
            continue
        names = parts_of(node)
        layer = layer_of(node, names[scheme.numbers])
        name = layer if product_of(node.target).layer is GROUPED_LINEAR else f"{layer}.weight"  # experts are bare parameters
        if name in found:
            found[name] = _also_read_by(found[name], node)
            continue
        parts = {part: program.constants[fqn] for part, fqn in names.items()}
        value = node.meta["val"]
        found[name] = Packed(layer, scheme, (node,), parts, _shape(scheme, parts), value.dtype)
    return found


def as_float(program: Program, packed: Mapping[str, Packed]) -> Program:
    """The same program whose packed weights are constants of the model's names, on meta: what `describe` compares. Its graph
    does not run."""
    gone = {fqn for weight in packed.values() for node in weight.readers for fqn in parts_of(node).values()}
    constants = {fqn: tensor for fqn, tensor in program.constants.items() if fqn not in gone}
    constants |= {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in packed.items()}
    return Program(program.graph, constants, program.aliases, program.signature, program.metadata)


def without_rounding(program: Program) -> Program:
    """The program whose products leave activations as they are."""
    copied = program.copy()
    for node in copied.graph.nodes:
        scheme = scheme_of(node.target)
        product = next((p for p in scheme.products if p.operator is node.target), None) if scheme else None
        if product is None or product.activations is None:
            continue
        plain = next((p for p in scheme.products if p.layer is product.layer and p.activations is None), None)
        if plain is not None:
            given = product.arguments(node.args)
            node.args = tuple(given.get(argument.name) for argument in plain.operator._schema.arguments)
            node.target = plain.operator
    return copied


def float_dtype(program: Program, packed: Mapping[str, Packed]) -> torch.dtype:
    """What the model computes in: the floating-point type of most of its numbers, packed ones included."""
    numbers: dict[torch.dtype, int] = {}
    for tensor in as_float(program, packed).constants.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    return max(numbers, key=numbers.__getitem__, default=torch.float32)


def refused(weight: Packed, tool: str, why: str, hint: str) -> UsageError:
    """That `tool` has no place for this weight."""
    return UsageError(f"{tool} cannot hold it as {weight.scheme.label}", where=weight.layer, why=why, hint=hint)


def _also_read_by(weight: Packed, node: fx.Node) -> Packed:
    return Packed(weight.layer, weight.scheme, (*weight.readers, node), weight.parts, weight.shape, weight.dtype)


def _shape(scheme: Scheme, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    numbers = parts[scheme.numbers]
    if numbers.ndim == 4:
        return tuple(numbers.shape)
    lead = numbers.shape[:-1]
    row = {part: torch.zeros(1, *t.shape[len(lead) :], dtype=t.dtype) for part, t in parts.items()}
    return (*lead, scheme.dense({part: row.get(part) for part in scheme.parts}).shape[-1])
