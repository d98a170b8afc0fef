"""Element by element: whatever is combined has the same axes, and is known where all of it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxc.analysis.axis import DYNAMIC, Mismatch, pin
from fxc.analysis.constants import Known, State, finite, widened
from fxc.analysis.dims import Axes, Dims, broadcast, fresh, fresh_axis, join, piece
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten


def axes_of_pointwise(axes: Axes, call: Call) -> Dims:
    tensors = [n for n in call.node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    result = tuple(broadcast([axes.values[n] for n in tensors]))
    # All of them may be of size 1 where the result has a size of its own.
    return result if len(result) == call.rank else fresh(call.value)


def known_of_pointwise(state: State, call: Call) -> Known | None:
    node = call.node
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if len(tensors) != len(node.all_input_nodes) or any(state.get(n) is None for n in tensors):
        return None

    def value(argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: state.found[n].values)

    mask = torch.ones((), dtype=torch.bool)
    for n in tensors:
        mask = mask & state.found[n].mask
    return finite(node.target(*value(node.args), **value(node.kwargs)), mask, call.rank) if mask.any() else None


register(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.relu6.default,
    aten.square.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.selu.default, aten.mish.default, aten.softplus.default,
    aten.hardswish.default, aten.hardsigmoid.default, aten.log_sigmoid.default, aten.min.other, aten.max.other,
    axes=axes_of_pointwise, known=known_of_pointwise,
)  # fmt: skip
register(
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar,
    aten.floor_divide.default, aten.floor_divide.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.clip.default,
    axes=axes_of_pointwise,
)  # fmt: skip


def _known_of_product(state: State, call: Call) -> Known | None:
    """Zero times anything is zero."""
    tensors = [n for n in call.node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if len(tensors) != 2:
        return known_of_pointwise(state, call)
    a, b = state.get(call[0]), state.get(call[1])
    if a is None or b is None:
        one = a or b
        return None if one is None else finite(torch.zeros_like(one.values, dtype=call.value.dtype), one.zeros(), call.rank)
    both = a.mask & b.mask
    values = torch.where(both, a.values * b.values, torch.zeros((), dtype=call.value.dtype))
    return finite(values, both | a.zeros() | b.zeros(), call.rank)


register(aten.mul.Tensor, axes=axes_of_pointwise, known=_known_of_product)


# ------------------------------------------------------------------------------------------------------ activations


def _axes_of_prelu(axes: Axes, call: Call) -> Dims:
    """Its weight is one number, or one for each channel."""
    source, weight = axes.values[call["self"]], axes.values[call["weight"]]
    if len(source) > 1 and weight:
        join(source[1], weight[0])
    return tuple(source)


def _known_of_prelu(state: State, call: Call) -> Known | None:
    known, weight = state.get(call["self"]), state.get(call["weight"])
    if known is None or weight is None or not weight.is_complete or call.rank < 2:
        return None
    slope = weight.values.reshape(-1, *[1] * (call.rank - 2))
    return finite(torch.where(known.values > 0, known.values, known.values * slope), known.mask, call.rank)


def _axes_of_glu(axes: Axes, call: Call) -> Dims:
    """The first half of a dimension, gated by the second."""
    dims = list(axes.values[call["self"]])
    d = call["dim"] % len(dims)
    half = dims[d].size // 2
    try:
        if dims[d] is DYNAMIC:
            raise Mismatch
        dims[d] = join(piece(dims[d], 0, half), piece(dims[d], half, 2 * half))
    except Mismatch:
        pin(dims[d], "it is cut within a part")
        dims[d] = fresh_axis(call.value.shape[d], "it is cut within a part")
    return tuple(dims)


def _known_of_glu(state: State, call: Call) -> Known | None:
    known, d = state.get(call["self"]), call["dim"] % call.rank
    size = call.shape_of("self")[d]
    if known is None or not isinstance(size, int):
        return None
    a, b = (widened(known, d, size).map(lambda t, i=i: t.chunk(2, d)[i]) for i in (0, 1))
    both = a.mask & b.mask
    return finite(torch.where(both, a.values * b.values.sigmoid(), 0), both | a.zeros(), call.rank)


register(aten.prelu.default, axes=_axes_of_prelu, known=_known_of_prelu)
register(aten.glu.default, axes=_axes_of_glu, known=_known_of_glu)


# -------------------------------------------------------------------------------------------- the same, in another type


def axes_of_first(axes: Axes, call: Call) -> Dims:
    return tuple(axes.values[call[0]])


def _known_of_cast(state: State, call: Call) -> Known | None:
    known = state.get(call[0])
    return known and Known(known.values.to(call.value.dtype), known.mask)


def known_of_first(state: State, call: Call) -> Known | None:
    return state.get(call[0])


register(aten.to.dtype, aten._to_copy.default, aten.type_as.default, axes=axes_of_first, known=_known_of_cast)
register(
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    axes=axes_of_first, known=known_of_first,
)  # fmt: skip
register(aten.dropout.default, aten.feature_dropout.default, axes=axes_of_first)
