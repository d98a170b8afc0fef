"""Operators that need every index of some dimensions, which they keep or reduce, and treat the others alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxc.analysis.axis import DYNAMIC, Axis, pin
from fxc.analysis.constants import Known, State, uniform, widened
from fxc.analysis.dims import Axes, Dims, fresh_axis, listed_dims, pinned_for
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten


def _along(why: str) -> Callable[[Axes, Call], Any]:
    def rule(axes: Axes, call: Call) -> Any:
        source = axes.values[call[0]]
        along = listed_dims(call["dim" if "dim" in call else "dims"], len(source))
        for d in along:
            pin(source[d], why)

        def of(value: Tensor) -> Dims:
            if value.ndim == len(source):
                return tuple(_resized(a, value.shape[d], why) if d in along else a for d, a in enumerate(source))
            return tuple(a for d, a in enumerate(source) if d not in along)

        return of(call.value) if isinstance(call.value, Tensor) else tuple(of(v) for v in call.value)

    return rule


def _resized(axis: Axis, size: Any, why: str) -> Axis:
    return axis if isinstance(size, int) and size == axis.size and axis is not DYNAMIC else fresh_axis(size, why)


def _known_of_mean(state: State, call: Call) -> Known | None:
    known = state.get(call["self"])
    if known is None or not call["dim"]:
        return None
    rank = known.values.ndim
    dims = [d % rank for d in call["dim"]]
    for d in dims:
        size = call.shape_of("self")[d]
        known = widened(known, d, size) if isinstance(size, int) else uniform(known, [d])
    values, mask = known.values.to(call.value.dtype).mean(dims, keepdim=True), known.mask
    for d in dims:
        mask = mask.all(d, keepdim=True)
    if not call["keepdim"]:
        for d in sorted(dims, reverse=True):
            values, mask = values.squeeze(d), mask.squeeze(d)
    return Known(values, mask)


_SUMMED = _along("it is summed or averaged over")
_ORDERED = _along("the order of its indices matters")

register(aten.mean.dim, axes=_SUMMED, known=_known_of_mean)
register(
    aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim, aten.std.correction,
    aten.std.dim, aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim, aten.argmax.default,
    aten.argmin.default, aten.max.dim, aten.min.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, axes=_SUMMED,
)  # fmt: skip
register(
    aten.cumsum.default, aten.cumprod.default, aten.flip.default, aten.sort.default, aten.argsort.default,
    aten.topk.default, aten.sort.stable, aten.roll.default, axes=_ORDERED,
)  # fmt: skip
register(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    axes=_along("it is normalised over by a softmax"),
)  # fmt: skip
register(aten.arange.default, aten.arange.start, aten.arange.start_step, axes=pinned_for("its indices are places"))
