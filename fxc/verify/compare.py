"""How far apart two programs are: over their outputs, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxc.ir.program import Program

_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT64_LIMIT = 1 << 31  # bytes of a program's float64 copy


def run(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The program's outputs on the CPU, by its operators' own definitions."""
    with torch.no_grad():
        return program.module()(*inputs)


def in_float64(program: Program) -> Program | None:
    """A copy that computes everything in float64, its casts promoted too; None when it would be too large or when one of
    its operators has no such form."""
    if any("fxc.int8" in str(node.target) for node in program.graph.nodes):
        return None
    if 8 * program.numel() > _FLOAT64_LIMIT:
        return None
    promoted = program.copy()
    promoted.constants = {k: t.double() if t.dtype in _HALVES else t for k, t in program.constants.items()}
    for node in promoted.graph.nodes:
        node.args = tuple(_promote(a) for a in node.args)
        node.kwargs = {k: _promote(a) for k, a in node.kwargs.items()}
    return promoted


def _promote(argument: object) -> object:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _HALVES else argument


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest over the outputs of |found - expected| / |expected| (Frobenius); infinite where shapes differ or one of
    the two is not finite where the other is."""
    return max((_relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(found, expected) else float("inf")
    a, b = found.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    a, b = torch.where(same, 0.0, a), torch.where(same, torch.where(b.isfinite(), b, 0.0), b)
    difference = torch.where(same, 0.0, a - b).norm().item()
    if difference == 0.0:
        return 0.0
    size = b.norm().item()
    error = difference / size if size > 0 else float("inf")
    return error if error == error else float("inf")


class _Recorder(fx.Interpreter):
    """Runs a program and keeps the values of some of its nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str]):
        super().__init__(module)
        self.wanted, self.values = names, {}

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node.name in self.wanted:
            self.values[node.name] = value
        return value


class _LocalErrors(fx.Interpreter):
    """Runs a program with the value of every replaced node put back to what it was, so that each error is its own."""

    def __init__(self, module: fx.GraphModule, expected: dict[str, Tensor]):
        super().__init__(module)
        self.expected, self.errors = expected, {}

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node.meta.get("replaces") in self.expected:
            expected = self.expected[node.meta["replaces"]]
            name = node.meta.get("layer") or node.meta.get("fqn") or node.name
            self.errors[name] = max(_relative_error(value, expected), self.errors.get(name, 0.0))
            return expected
        return value


def layer_errors(before: Program, after: Program, inputs: Sequence[Tensor], by: str) -> dict[str, float]:
    """Relative error of every layer that the pass `by` rewrote, each given the inputs that it had before."""
    replaced = {n.meta["replaces"] for n in after.graph.nodes if n.meta.get("by") == by and n.meta.get("replaces")}
    with torch.no_grad():
        recorder = _Recorder(before.module(), replaced)
        recorder.run(*inputs)
        local = _LocalErrors(after.module(), recorder.values)
        local.run(*inputs)
    return local.errors
