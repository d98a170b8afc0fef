"""Convolutions, in groups too, and transposed ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxc.analysis.axis import ONE, Mismatch, give_role, pin, product_of, resolve, split, unify
from fxc.analysis.constants import Known, State, constant_along, finite, uniform, unread, widened
from fxc.analysis.dims import Axes, Dims, Site, fresh_axis, join, pinned
from fxc.analysis.operators.linear import COMPUTED, is_computed
from fxc.analysis.operators.table import Dead, MaskOf, register
from fxc.ir.call import Call

aten = torch.ops.aten
SPATIAL = "it is a height or a width"


def pads(call: Call) -> bool:
    """Whether it adds zeros at the border."""
    padding = call["padding"]
    return padding == "same" or any(padding if isinstance(padding, (list, tuple)) else [0 if padding == "valid" else padding])


def _axes(axes: Axes, call: Call) -> Dims:
    source, weight = axes.values[call["input"]], axes.values[call["weight"]]
    if call.rank != len(source) or len(source) != len(weight):
        return pinned(axes, call, f"{call.name} without a batch")
    for axis in source[2:]:
        pin(axis, "a convolution slides over it")
    for axis in weight[2:]:
        pin(axis, "it is a kernel's height or width")
    out, inner = weight[0], weight[1]
    if call["groups"] > 1:
        try:
            group, _ = split(out, call["groups"])
            unify(source[1], product_of(group, inner))
            if resolve(inner) != ONE:
                give_role(group, "conv_group")
        except Mismatch:
            for axis in (out, source[1], inner):
                pin(axis, "its groups are not parts of it")
    else:
        join(source[1], inner)
    if inner != ONE:
        axes.sites.append(Site(call.node, inner, ((0, 1), (1, 1))))
    give_role(out, "channel")
    if isinstance(call["bias"], fx.Node):
        join(axes.values[call["bias"]][0], out)
    return (source[0], out, *(fresh_axis(s, SPATIAL) for s in call.value.shape[2:]))


def _known(state: State, call: Call) -> Known | None:
    weight, bias = state.get(call["weight"]), state.get(call["bias"])
    if weight is None or not weight.is_complete or (call["bias"] is not None and bias is None):
        return None
    kernel = weight.values.expand(call.shape_of("weight"))
    outputs, inner = kernel.shape[:2]
    groups = call["groups"]
    reads = kernel.reshape(outputs, inner, -1).any(2)  # [O, I/g]
    known, rank = state.get(call["input"]), kernel.ndim
    sums = kernel.double().reshape(outputs, inner, -1).sum(2)
    if known is not None:
        known = widened(uniform(known, [0, *range(2, rank)]), 1, groups * inner)
        constant, values = known.mask.reshape(groups, 1, inner), known.values.reshape(groups, 1, inner)
        if pads(call):
            constant = constant & (values == 0)
        result = ~(reads.reshape(groups, -1, inner) & ~constant).any(2)
        sums = (sums.reshape(groups, -1, inner) * torch.where(constant, values, 0).double()).sum(2)
        values, result = sums.reshape(-1), result.reshape(-1)
    else:
        values, result = torch.zeros(outputs, dtype=torch.float64), ~reads.any(1)
    values = values.to(kernel.dtype)
    if bias is not None:
        values, result = values + bias.values, result & bias.mask
    shape = (1, outputs, *[1] * (rank - 2))
    return finite(values.reshape(shape), result.reshape(shape), rank)


def _dead(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    weight, kernel, groups = known.get(call["weight"]), call.shape_of("weight"), call["groups"]
    outputs, inner = kernel[:2]
    mask, values = constant_along(known.get(call["input"]), 1, groups * inner)
    mask, values = mask.reshape(groups, inner), values.reshape(groups, inner)
    if weight is None or not weight.is_complete:
        return Dead((mask & (values == 0)).all(0))
    skipped = ~weight.values.expand(kernel).reshape(groups, outputs // groups, inner, -1).any(3).any(1)
    if not (mask & ~skipped & (values != 0)).any():
        return Dead((skipped | mask).all(0))
    kept = None
    if pads(call):
        kept = "it reads constants and pads with zeros, so that they are not constant at the border"
    elif is_computed(call):
        kept = COMPUTED
    if kept:
        return Dead((skipped | (mask & (values == 0))).all(0), kept=kept)
    return Dead((skipped | mask).all(0), fold=torch.where(skipped, 0, values))


def _fold(weight: Tensor, gone: Tensor) -> Tensor:
    """gone: [groups, inner]."""
    groups, inner = gone.shape
    sums = (weight.double().reshape(groups, -1, inner, weight[0, 0].numel())).sum(3)
    return (sums * gone[:, None]).sum(2).flatten()


def _count_groups(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    groups = call.shape_of("input")[1] // call.shape_of("weight")[1] if call["groups"] > 1 else 1
    if groups == call["groups"]:
        return False
    call.set("groups", groups)
    return True


register(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, axes=_axes, known=_known, dead=_dead, fold=_fold, resize=_count_groups,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ transposed


def _axes_of_transposed(axes: Axes, call: Call) -> Dims:
    source, weight = axes.values[call["input"]], axes.values[call["weight"]]
    if call.rank != len(source) or call["groups"] > 1:
        return pinned(axes, call, f"{call.name} in groups or without a batch")
    for axis in (*source[2:], *weight[2:]):
        pin(axis, "a convolution slides over it")
    axes.sites.append(Site(call.node, join(source[1], weight[0]), ((0, 1), (1, 0))))
    give_role(weight[1], "channel")
    if isinstance(call["bias"], fx.Node):
        join(axes.values[call["bias"]][0], weight[1])
    return (source[0], weight[1], *(fresh_axis(s, SPATIAL) for s in call.value.shape[2:]))


def _known_of_transposed(state: State, call: Call) -> Known | None:
    """A channel to which nothing is added is its bias. Constants other than zero come out as others at the border."""
    weight, bias = state.get(call["weight"]), state.get(call["bias"])
    if weight is None or not weight.is_complete or call["groups"] > 1 or (isinstance(call["bias"], fx.Node) and bias is None):
        return None
    rank, kernel = call.rank, weight.values.expand(call.shape_of("weight"))
    if kernel.ndim != rank:
        return None
    reads = kernel.flatten(2).any(2)  # [I, O]
    known = state.get(call["input"])
    if known is not None:
        reads = reads & ~uniform(known, [0, *range(2, rank)]).zeros().reshape(-1, 1)
    shape = (1, kernel.shape[1], *[1] * (rank - 2))
    values = torch.zeros(kernel.shape[1], dtype=kernel.dtype) if bias is None else bias.values.expand(kernel.shape[1])
    mask = ~reads.any(0) & (True if bias is None else bias.mask)
    return finite(values.reshape(shape), mask.reshape(shape), rank)


def _dead_of_transposed(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    """At the border fewer terms are added up, so that only zeros go."""
    mask, values = constant_along(known.get(call["input"]), 1, site.axis.size)
    others = tuple(d for d in range(len(call.shape_of("weight"))) if d != 0)
    return Dead(unread(call["weight"], known, site.axis.size, others) | (mask & (values == 0)))


register(
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    axes=_axes_of_transposed, known=_known_of_transposed, dead=_dead_of_transposed,
)  # fmt: skip
