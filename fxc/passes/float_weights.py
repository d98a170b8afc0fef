"""What the passes share that give float weights other numbers, and leave them floats: which weights, why not the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxc.errors import InputRefused
from fxc.ir.names import layer_at
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Pass, Refusal, Result
from fxc.passes.linears import GROUPED, LINEAR
from fxc.passes.patterns import patterns_in

aten = torch.ops.aten
CONVOLUTIONS = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
})  # fmt: skip
_LAYERS = CONVOLUTIONS | {LINEAR, GROUPED}


@dataclass(frozen=True)
class FloatWeights(Pass):
    """Base of the policies that change the weights of linear layers, experts and convolutions, which stay dense floats."""

    is_policy: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False
    only: str = field(default="", kw_only=True)
    """Patterns of the layers to change, separated by ";", globs or "re:..." regular expressions; all where there is none."""

    def limited_to(self) -> tuple[str, ...]:
        return patterns_in(self.only)

    def declines(self, node: fx.Node) -> str | None:
        """Why this pass leaves the layer `node`, with what to do, or None."""
        return None

    def chosen(self, program: Program, context: Context, result: Result) -> dict[str, list[fx.Node]]:
        """The weights to change, each with the layers that read it, in the order in which they run; those that are left are
        named in `result`."""
        chosen: dict[str, list[fx.Node]] = {}
        refused: set[str] = set()
        for node in program.graph.nodes:
            if node.target not in _LAYERS:
                continue
            fqn = layer_at(program, node)
            pattern = context.skips(fqn) if self.covers(fqn) else None
            if reason := f"skipped by the pattern {pattern}" if pattern else self._refusal(program, node, fqn):
                named = node.args[1].target if node.args[1].op == "get_attr" else ""
                nbytes = program.constants[named].nbytes if named and named not in refused else 0
                refused.add(named)
                result.refusals.append(Refusal(fqn, reason, nbytes))
            else:
                chosen.setdefault(node.args[1].target, []).append(node)
        # A weight that one of its layers may not touch is left to all of them.
        return {fqn: nodes for fqn, nodes in chosen.items() if fqn not in refused}

    def _refusal(self, program: Program, node: fx.Node, fqn: str) -> str | None:
        if not self.covers(fqn):
            return f"outside of only={self.only}"
        weight = node.args[1]
        if weight.op != "get_attr":
            return "its weight is computed while the model runs"
        tensor = program.constants[weight.target]
        if not tensor.is_floating_point():
            return f"its weight is {tensor.dtype}"
        if tensor.numel() == 0:
            return "its weight is empty"
        if not all(user.target in _LAYERS and user.args[1] is not user.args[0] for user in users_of(program, weight.target)):
            return "its weight is tied to another use (an embedding)"
        return self.declines(node)


def checked(fqn: str, weight: Tensor) -> Tensor:
    """`weight` in float32. Raises InputRefused where it holds NaN or Inf."""
    values = weight.detach().float()
    if not values.isfinite().all():
        hint = "check the checkpoint, or leave this layer out with skip="
        raise InputRefused("the weight holds NaN or Inf", where=fqn, hint=hint)
    return values
