"""Linear layers with int8 weights, and int8 activations or not.

   %3: f32[s0, 64] = aten.linear(%2, @mlp.up.weight, @mlp.up.bias)
-> %3: f32[s0, 64] = fxc.int8_linear(%2, @mlp.up.qweight, @mlp.up.scale, @mlp.up.bias)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxc.ir.edit import call, constant, is_free, read, sweep
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Refusal, Result
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS
from fxc.schemes import int8 as scheme
from fxc.schemes import ops

_LINEAR = torch.ops.aten.linear.default
_GROUPED = ops.GROUPED_LINEAR
MIN_OUTPUTS = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Int8(Pass):
    """Quantize the weights of linear layers, experts of mixtures included, to int8 with one scale for each output channel.

    mode: "dynamic" quantizes activations too, each token by its own range, as the layer runs; "weight_only" keeps them.
    """

    mode: Literal["dynamic", "weight_only"] = "dynamic"

    name: ClassVar[str] = "int8"
    is_policy: ClassVar[bool] = True
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS})

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        packed: dict[str, tuple[str, str]] = {}
        for node in list(program.graph.nodes):
            if node.target not in (_LINEAR, _GROUPED):
                continue
            fqn = layer_of(node)
            if reason := (context.skips(fqn) and f"skipped by the pattern {context.skips(fqn)}") or self._refusal(
                program, node
            ):
                result.refusals.append(Refusal(fqn, reason))
                continue
            weight = node.args[1].target
            if weight not in packed:
                tensor = program.constants[weight]
                result.covered_bytes += tensor.numel() * tensor.element_size()
                packed[weight] = _pack(program, weight, node)
            self._rewrite(program, node, *packed[weight])
            result.changed += 1
        sweep(program)
        return result

    def _refusal(self, program: Program, node: fx.Node) -> str | None:
        weight = node.args[1]
        if weight.op != "get_attr":
            return "its weight is computed while the model runs"
        tensor = program.constants[weight.target]
        if tensor.dtype not in _FLOATS:
            return f"its weight is {tensor.dtype}"
        if tensor.numel() == 0:
            return "its weight is empty"
        if not all(_is_only_weight_of(user, weight.target) for user in users_of(program, weight.target)):
            return "its weight is tied to another use (an embedding)"
        if self.mode == "weight_only" and node.target is _GROUPED:
            return "experts have no weight-only form: use mode=dynamic"
        if tensor.shape[-2] < MIN_OUTPUTS:
            return f"it has only {tensor.shape[-2]} outputs: nothing to gain, and such heads and routers are sensitive"
        if not _is_smaller(tensor):
            return f"int8 with its scales would not be smaller than {tensor.dtype}{list(tensor.shape)}"
        return None

    def _rewrite(self, program: Program, node: fx.Node, qweight: str, scale: str) -> None:
        arguments = [read(program, qweight, before=node), read(program, scale, before=node)]
        if node.target is _GROUPED:
            call(
                program,
                ops.INT8_GROUPED_LINEAR,
                (node.args[0], *arguments, node.args[2]),
                replacing=node,
                by=self.name,
            )
            return
        operator = ops.INT8_LINEAR if self.mode == "dynamic" else ops.INT8_WEIGHT_ONLY_LINEAR
        bias = node.args[2] if len(node.args) > 2 else None
        call(program, operator, (node.args[0], *arguments, bias), replacing=node, by=self.name)


def layer_of(node: fx.Node) -> str:
    """What a user calls the layer: its weight's name without the last part, or the whole name of a bare parameter."""
    weight = node.args[1]
    if weight.op != "get_attr":
        return node.meta.get("fqn") or str(node)
    return weight.target.removesuffix(".weight")


def _is_only_weight_of(user: fx.Node, fqn: str) -> bool:
    """Whether `user` is a linear that reads the constant `fqn` as its weight and as nothing else."""
    reads = [i for i, a in enumerate(user.args) if isinstance(a, fx.Node) and a.op == "get_attr" and a.target == fqn]
    return user.target in (_LINEAR, _GROUPED) and reads == [1]


def _is_smaller(weight: Tensor) -> bool:
    rows = weight.numel() // weight.shape[-1]
    return weight.numel() + 4 * rows < weight.numel() * weight.element_size()


def _pack(program: Program, weight: str, before: fx.Node) -> tuple[str, str]:
    """Replace the constant `weight` by its int8 form; return the names of the integers and of their scales."""
    tensor, base = program.constants[weight], weight.removesuffix(".weight")
    qweight, scale = _quantize(tensor)
    names = _free_name(program, weight, base, "qweight"), _free_name(program, weight, base, "scale")
    for name, value in zip(names, (qweight, scale), strict=True):
        constant(program, name, value, before)
    return names


def _free_name(program: Program, weight: str, base: str, part: str) -> str:
    """`base.part`, or `base.int8.part`, `base.int8_2.part`, ... where the module has something of that name already."""
    prefixes = itertools.chain([base, f"{base}.int8"], (f"{base}.int8_{n}" for n in itertools.count(2)))
    return next(name for p in prefixes if is_free(program, name := f"{p}.{part}", weight))


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.is_meta:
        return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    qweight, scale = scheme.quantize_weight(weight.reshape(-1, weight.shape[-1]))
    return qweight.reshape(weight.shape), scale.reshape(weight.shape[:-1])
