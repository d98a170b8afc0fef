"""Normalisation: what it runs over keeps its size; a scale of zero makes the bias of the output."""

from __future__ import annotations

import torch
from torch import fx

from fxc.analysis.axis import pin
from fxc.analysis.constants import Known, State, compute, finite, uniform, widened
from fxc.analysis.dims import Axes, Dims, by_spec, join
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten
NORMALISED = "it is normalised over"


def _parameters(call: Call) -> list[fx.Node | None]:
    """Weight and bias; a root mean square has no bias."""
    return [call["weight"], call.get("bias")]


# ------------------------------------------------------------------------------------------- of the last dimensions


def _axes_of_layer(axes: Axes, call: Call) -> Dims:
    source = axes.values[call["input"]]
    last = len(call["normalized_shape"])
    for axis in source[-last:]:
        pin(axis, NORMALISED)
    for parameter in _parameters(call):
        if isinstance(parameter, fx.Node):
            for a, b in zip(axes.values[parameter], source[-last:], strict=True):
                join(a, b)
    return tuple(source)


def _known_of_layer(state: State, call: Call) -> Known | None:
    if not state.has_all_of(*_parameters(call)):
        return None
    known, rank, last = state.get(call["input"]), call.rank, len(call["normalized_shape"])
    if known is not None and known.mask.flatten(-last).all(-1).any():
        for d, size in enumerate(call["normalized_shape"], rank - last):
            known = widened(known, d, size)
        everything = known.mask.flatten(-last).all(-1).reshape(*known.mask.shape[:-last], *[1] * last)
        return finite(compute(state, call, known.values), everything, rank)
    weight, bias = map(state.get, _parameters(call))
    if weight is None:
        return None
    return finite(torch.zeros_like(weight.values) if bias is None else bias.values, weight.zeros(), rank)


register(aten.layer_norm.default, aten.rms_norm.default, axes=_axes_of_layer, known=_known_of_layer)


# ---------------------------------------------------------------------------------------------------------- of a batch


def _axes_of_channels(axes: Axes, call: Call, uses_batch: bool) -> Dims:
    if uses_batch:
        for d, axis in enumerate(axes.values[call["input"]]):
            if d != 1:
                pin(axis, NORMALISED)
    return by_spec(axes, call, "n c ..., c, c, c, c -> n c ...")


def _known_of_batch(state: State, call: Call) -> Known | None:
    names = ("weight", "bias", "running_mean", "running_var")
    if call["training"] or not state.has_all_of(*(call[name] for name in names)):
        return None  # in training mode it depends on the batch
    known, shape = state.get(call["input"]), (1, -1, *[1] * (call.rank - 2))
    found = (state.get(call[name]) for name in names)
    weight, bias, mean, variance = (None if p is None else p.values.double().reshape(shape) for p in found)
    scale = (variance + call["eps"]).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    dead = scale == 0
    values = shift if known is None else torch.where(known.mask, known.values.double(), 0) * scale + shift
    return finite(values.to(call.value.dtype), dead if known is None else dead | known.mask, call.rank)


register(
    aten.batch_norm.default, axes=lambda axes, call: _axes_of_channels(axes, call, call["training"]), known=_known_of_batch
)  # fmt: skip
register(aten.instance_norm.default, axes=lambda axes, call: _axes_of_channels(axes, call, call["use_input_stats"]))


# ----------------------------------------------------------------------------------------------------------- in groups


def _axes_of_groups(axes: Axes, call: Call) -> Dims:
    source = axes.values[call["input"]]
    for axis in source[1:]:
        pin(axis, "it is normalised over in groups")
    for parameter in call.node.all_input_nodes[1:]:
        join(axes.values[parameter][0], source[1])
    return tuple(source)


def _known_of_groups(state: State, call: Call) -> Known | None:
    """A group of constant channels is normalised to constants; a channel of scale zero is its bias."""
    known, channels, groups, rank = state.get(call["input"]), call.shape_of("input")[1], call["num_groups"], call.rank
    if any(isinstance(a, fx.Node) and state.get(a) is None for a in _parameters(call)):
        return None
    weight, bias = map(state.get, _parameters(call))
    shape = (1, channels, *[1] * (rank - 2))
    if known is not None:
        known = widened(uniform(known, [0, *range(2, rank)]), 1, channels)
        whole = known.mask.reshape(groups, -1).all(1).repeat_interleave(channels // groups).reshape(shape)
        if whole.any():
            return finite(compute(state, call, known.values), whole, rank)
    if weight is None:
        return None
    values = torch.zeros_like(weight.values) if bias is None else bias.values
    return finite(values.reshape(shape), weight.zeros().reshape(shape), rank)


register(aten.group_norm.default, axes=_axes_of_groups, known=_known_of_groups)
