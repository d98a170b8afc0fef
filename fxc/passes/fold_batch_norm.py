"""Batch norms of constants become a part of the layers beside them.

    constant @conv.weight: f32[8, 4, 3, 3]
    constant @n.weight: f32[8]
    constant @n.bias: f32[8]
    constant @n.mean: f32[8]
    constant @n.variance: f32[8]
    values @n.variance[:] = 2
    %0: f32[s0, 4, 9, 9] = input "x"
    %1: f32[s0, 8, 7, 7] = aten.conv2d(%0, @conv.weight)  # conv
    %2: f32[s0, 8, 7, 7] = aten.batch_norm(%1, @n.weight, @n.bias, @n.mean, @n.variance, False, 0.1, 1e-05, False)  # n
    return "out" %2
    ---
    constant @conv.bias: f32[8]
    constant @conv.weight: f32[8, 4, 3, 3]
    %0: f32[s0, 4, 9, 9] = input "x"
    %1: f32[s0, 8, 7, 7] = aten.conv2d(%0, @conv.weight, @conv.bias)  # conv
    return "out" %1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxc.analysis.operators.convolution import pads
from fxc.ir.call import Call
from fxc.ir.edit import constant, free_name, replace, sweep
from fxc.ir.names import layer_at
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Refusal, Result
from fxc.passes.facts import CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION

aten = torch.ops.aten
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, *_TRANSPOSED,
}  # fmt: skip
_LAYERS = {aten.linear.default, *_CONVOLUTIONS}
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


class _Stays(Exception):
    """Why a batch norm cannot be folded."""


def _layers(program: Program, norm: fx.Node) -> tuple[list[fx.Node], bool]:
    """The layers that the batch norm `norm` goes into: the one that it follows, or all that read it; and whether it follows.

    Raises `_Stays`."""
    call = Call(norm)
    if call["training"] or call["running_mean"] is None:
        raise _Stays("it normalises by the statistics of what it is given")
    given = [call[name] for name in _PARAMETERS if call[name] is not None]
    if any(parameter.op != "get_attr" for parameter in given):
        raise _Stays("its parameters are computed while the model runs")
    source, readers = call["input"], list(norm.users)
    try:
        if source.target not in _LAYERS:
            raise _Stays("it does not follow a layer")
        if len(source.users) > 1:
            raise _Stays(f"what it follows ({layer_at(program, source)}) is read by others too")
        _check(program, source)
        return [source], True
    except _Stays as behind:
        try:
            for reader in readers:
                if reader.target not in _LAYERS or Call(reader)["input"] is not norm or reader.args.count(norm) > 1:
                    raise _Stays(f"{reader} reads it, which is no layer")
                _check(program, reader)
                if not _shifts_nothing(program, call) and (reader.target in _TRANSPOSED or _is_padded(reader)):
                    raise _Stays(f"{layer_at(program, reader)} reads it with zeros around it, which are not shifted") from None
        except _Stays as before:
            raise _Stays(f"{behind}, and {before}") from None
        return readers, False


def _check(program: Program, layer: fx.Node) -> None:
    """Raises `_Stays` where the weight or bias of `layer` cannot be changed, or channels are not its second dimension."""
    call, name = Call(layer), layer_at(program, layer)
    for parameter in (call["weight"], call["bias"]):
        if parameter is not None and parameter.op != "get_attr":
            raise _Stays(f"the weight or bias of {name} is computed while the model runs")
        if parameter is not None and users_of(program, parameter.target) != [layer]:
            raise _Stays(f"{parameter.target} is read by others too")
    rank = len(call.shape_of("weight"))
    if not len(call.shape_of("input")) == call.rank == rank:
        raise _Stays(f"the channels of {name} are not its second dimension")


def _is_padded(layer: fx.Node) -> bool:
    return layer.target in _CONVOLUTIONS and pads(Call(layer))


def _shifts_nothing(program: Program, norm: Call) -> bool:
    _, shift = _affine(program, norm)
    return not shift.is_meta and not shift.any()


def _affine(program: Program, norm: Call) -> tuple[Tensor, Tensor]:
    """(scale, shift) float64 [C]: the norm is x * scale + shift."""
    found = (norm[name] and program.constants[norm[name].target].double() for name in _PARAMETERS)
    weight, bias, mean, variance = found
    scale = (variance + norm["eps"]).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


def _foldable(program: Program) -> dict[str, str]:
    found = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        try:
            layers, _ = _layers(program, node)
            found[node.name] = f"{node} could be a part of {layer_at(program, layers[0])}" if layers else "nothing reads it"
        except _Stays:
            pass
    return found


FOLDED_BATCH_NORM = Fact("folded_batch_norm", _foldable)
"""No batch norm stands beside a layer whose weight and bias could do what it does."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold each batch norm of constants (in eval mode) into the weight and bias of the convolution or linear layer that it
    follows, or of all that read it where that changes nothing: there may be no zeros around what they read."""

    name: ClassVar[str] = "fold_batch_norm"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION})
    gives: ClassVar[frozenset[Fact]] = frozenset({FOLDED_BATCH_NORM})
    rounds: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        # Of several in a row each is folded into what the one before it went into.
        for norm in list(program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)):
            name = norm.meta.get("fqn") or norm.name
            try:
                layers, follows = _layers(program, norm)
            except _Stays as why:
                result.refusals.append(Refusal(name, str(why)))
                continue
            if not context.rewrites.may(name):
                break
            scale, shift = _affine(program, Call(norm))
            for layer in layers:
                (_scale_outputs if follows else _scale_inputs)(program, layer, scale, shift)
            replace(norm, norm.args[0])
            program.graph.erase_node(norm)
            result.changed += 1
        sweep(program)
        return result


def _scale_outputs(program: Program, layer: fx.Node, scale: Tensor, shift: Tensor) -> None:
    """Let `layer` give y * scale + shift where it gave y."""
    weight, bias = _weight(program, layer), _bias(program, layer)
    if layer.target in _TRANSPOSED:
        wide = weight.unflatten(0, (Call(layer)["groups"], -1))
        factor = scale.reshape(wide.shape[0], 1, -1, *[1] * (wide.ndim - 3))
        _set(program, layer, (wide * factor).flatten(0, 1), bias * scale + shift)
    else:
        _set(program, layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale + shift)


def _scale_inputs(program: Program, layer: fx.Node, scale: Tensor, shift: Tensor) -> None:
    """Let `layer` give of x what it gave of x * scale + shift."""
    weight, bias = _weight(program, layer), _bias(program, layer)
    if layer.target in _TRANSPOSED:
        # With zeros around, nothing is shifted.
        _set(program, layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias)
        return
    groups = Call(layer).get("groups") or 1
    wide = weight.unflatten(0, (groups, -1))
    scale, shift = (each.reshape(groups, 1, -1, *[1] * (weight.ndim - 2)) for each in (scale, shift))
    moved = (wide * shift).flatten(2).sum(2).flatten()
    _set(program, layer, (wide * scale).flatten(0, 1), bias + moved)


def _weight(program: Program, layer: fx.Node) -> Tensor:
    return program.constants[Call(layer)["weight"].target].double()


def _bias(program: Program, layer: fx.Node) -> Tensor:
    call, bias = Call(layer), Call(layer)["bias"]
    if bias is not None:
        return program.constants[bias.target].double()
    weight = call["weight"].meta["val"]
    outputs = weight.shape[1] * call["groups"] if layer.target in _TRANSPOSED else weight.shape[0]
    return torch.zeros(outputs, dtype=torch.float64, device=program.constants[call["weight"].target].device)


def _set(program: Program, layer: fx.Node, weight: Tensor, bias: Tensor) -> None:
    call = Call(layer)
    fqn = call["weight"].target
    dtype = program.constants[fqn].dtype
    program.constants[fqn] = weight.to(dtype)
    if call["bias"] is not None:
        program.constants[call["bias"].target] = bias.to(dtype)
        return
    base = fqn.removesuffix(".weight")
    name = free_name(program, f"{base}.bias" if base != fqn else f"{fqn}_bias")
    call.set("bias", constant(program, name, bias.to(dtype), before=layer))
