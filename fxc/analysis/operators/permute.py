"""The same data with its dimensions in another order."""

from __future__ import annotations

import torch

from fxc.analysis.constants import Known, State, compute
from fxc.analysis.dims import Axes, Dims
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten


def _axes(axes: Axes, call: Call) -> Dims:
    source = axes.values[call[0]]
    # Of a vector and of a number aten.t and mT give what they are given.
    numbered = torch.empty([*range(1, len(source) + 1)], device="meta")
    return tuple(source[number - 1] for number in call.node.target(numbered, *call.node.args[1:]).shape)


def _known(state: State, call: Call) -> Known | None:
    known = state.get(call[0])
    return known and known.map(lambda t: compute(state, call, t))


register(
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.swapaxes.default, aten.swapdims.default, aten.mT.default, axes=_axes, known=_known,
)  # fmt: skip
