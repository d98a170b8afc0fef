"""Pooling and interpolation: heights and widths change, channels stay."""

from __future__ import annotations

import torch

from fxc.analysis.axis import pin
from fxc.analysis.constants import Known, State, uniform
from fxc.analysis.dims import Axes, Dims, fresh_axis
from fxc.analysis.operators.convolution import SPATIAL
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten


def _spatial(call: Call) -> int:
    """How many dimensions are pooled over."""
    window = call["kernel_size" if "kernel_size" in call else "output_size"]
    return len(window) if isinstance(window, (list, tuple)) else len(call.shape_of(0)) - 2


def _axes_of_pool(axes: Axes, call: Call) -> Dims:
    source, spatial = axes.values[call[0]], _spatial(call)
    for axis in source[-spatial:]:
        pin(axis, "it is pooled over")
    return (*source[:-spatial], *(fresh_axis(s, SPATIAL) for s in call.value.shape[-spatial:]))


def _known_of_pool(state: State, call: Call) -> Known | None:
    """A channel of one number stays that."""
    known = state.get(call[0])
    if known is None:
        return None
    rank = known.values.ndim
    return uniform(known, list(range(rank - _spatial(call), rank)))


def _known_of_average(state: State, call: Call) -> Known | None:
    """At the border zeros are averaged in, so that only zero stays what it is."""
    known = _known_of_pool(state, call)
    return known and Known(known.values, known.zeros())


def _axes_of_interpolation(axes: Axes, call: Call) -> Dims:
    source = axes.values[call["input"]]
    for axis in source[2:]:
        pin(axis, "it is interpolated")
    return (*source[:2], *(fresh_axis(s, SPATIAL) for s in call.value.shape[2:]))


def _known_of_interpolation(state: State, call: Call) -> Known | None:
    known = state.get(call["input"])
    return known and uniform(known, list(range(2, known.values.ndim)))


register(
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, axes=_axes_of_pool, known=_known_of_pool,
)  # fmt: skip
register(
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, axes=_axes_of_pool, known=_known_of_average
)  # fmt: skip
register(
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec, axes=_axes_of_interpolation, known=_known_of_interpolation,
)  # fmt: skip
