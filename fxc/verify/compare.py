"""How far apart two programs are: over their outputs, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.ir.names import layer_at, parts_of
from fxc.ir.observe import Watch, observe, values_at
from fxc.ir.program import Program
from fxc.schemes.scheme import scheme_of


@dataclass(frozen=True)
class Difference:
    """How far apart two lists of outputs are. error: the largest over the floating-point outputs of
    |found - expected| / |expected| (Frobenius), infinite where one of the two is not finite where the other is; finite:
    how many finite numbers it was measured on, `integers` included; integers: how many integers and booleans were
    compared, and `unequal` of them differ."""

    error: float = 0.0
    finite: int = 0
    integers: int = 0
    unequal: int = 0

    def __or__(self, other: Difference) -> Difference:
        """Of both together."""
        return Difference(
            max(self.error, other.error),
            self.finite + other.finite,
            self.integers + other.integers,
            self.unequal + other.unequal,
        )


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Compare outputs one by one. Where shapes differ the error is infinite."""
    total = Difference()
    for a, b in zip(found, expected, strict=True):
        total |= _difference(a, b)
    return total


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """`Difference.error`, infinite where an integer differs; 0.0 where both are NaN or infinite in the same places."""
    total = difference(found, expected)
    return float("inf") if total.unequal else total.error


def _difference(found: Tensor, expected: Tensor) -> Difference:
    if found.shape != expected.shape:
        return Difference(error=float("inf"))
    if expected.dtype.is_complex:
        found, expected = torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    if not expected.dtype.is_floating_point:
        return Difference(0.0, expected.numel(), expected.numel(), int((found != expected).sum()))
    a, b = found.double(), expected.double()
    finite = int(b.isfinite().sum())
    same = (a == b) | (a.isnan() & b.isnan())
    a, b = torch.where(same, 0.0, a), torch.where(same, torch.where(b.isfinite(), b, 0.0), b)
    distance = torch.where(same, 0.0, a - b).norm().item()
    if distance == 0.0:
        return Difference(0.0, finite)
    size = b.norm().item()
    error = distance / size if size > 0 else float("inf")
    return Difference(error if error == error else float("inf"), finite)


def layer_errors(before: Program, after: Program, inputs: Sequence[Tensor], by: str) -> dict[str, float]:
    """Relative error of every layer that the pass `by` rewrote, each given the inputs that it had before. A layer whose
    shape the pass changed cannot be compared, nor one that has no finite value before: they are left out."""
    pairs = rewritten(before, after, by)
    differences: dict[str, Difference] = {}

    def compared(node: fx.Node, expected: object) -> Watch:
        """Measure a value against what it was before, and go on with that, so that each error is its own."""
        layer = layer_at(after, node)

        def watch(value: object) -> Tensor | None:
            if not isinstance(value, Tensor) or not isinstance(expected, Tensor) or value.shape != expected.shape:
                return None
            differences[layer] = differences.get(layer, Difference()) | _difference(value, expected)
            return expected.to(value.dtype)

        return watch

    with torch.no_grad():
        values = values_at(before.module(), inputs, set(pairs.values()))
        nodes = [node for node in after.graph.nodes if node.name in pairs]
        observe(after.module(), inputs, {node.name: compared(node, values[pairs[node.name]]) for node in nodes})
    return {name: d.error for name, d in differences.items() if d.finite > d.integers}


def saturation(program: Program, by: str) -> dict[str, float]:
    """Of the layers that the pass `by` packed, the share of their weights' numbers at the ends of the format's range."""
    shares = {}
    for node in program.graph.nodes:
        scheme, parts = scheme_of(node.target), parts_of(node)
        if node.meta.get("by") == by and scheme is not None and scheme.numbers in parts:
            share = scheme.saturation(program.constants[parts[scheme.numbers]])
            if share is not None:
                shares[layer_at(program, node)] = share
    return shares


def rewritten(before: Program, after: Program, by: str) -> dict[str, str]:
    """The names of the nodes that the pass `by` made in the place of another, of those whose call it changed, and of those
    that read a constant that it changed -> the names of their counterparts before."""
    old = {node.name: node for node in before.graph.nodes if node.op == "call_function"}
    made = {
        node.name: node.meta["replaces"]
        for node in after.graph.nodes
        if node.meta.get("by") == by and node.name not in old and node.meta.get("replaces") in old
    }
    changed = {fqn for fqn, tensor in after.constants.items() if tensor is not before.constants.get(fqn)}

    def written(node: fx.Node) -> str:
        """The call, a constant named by itself and a value by the node that it stood in before the pass."""

        def name(a: fx.Node) -> str:
            return f"@{a.target}" if a.op == "get_attr" else f"%{made.get(a.name, a.name)}"

        return str(fx.map_arg((str(node.target), node.args, node.kwargs), name))

    edited = {
        node.name: node.name
        for node in after.graph.nodes
        if node.op == "call_function"
        and node.name in old
        and (written(node) != written(old[node.name]) or any(n.target in changed for n in node.all_input_nodes))
    }
    return made | edited
