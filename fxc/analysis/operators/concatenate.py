"""Values side by side: concatenated, stacked, padded, repeated."""

from __future__ import annotations

import torch

from fxc.analysis.axis import DYNAMIC, ONE, Atom, pin, sum_of
from fxc.analysis.constants import Known, State, uniform
from fxc.analysis.dims import Axes, Dims, broadcast, fresh_axis, join
from fxc.analysis.operators.table import register
from fxc.ir.call import Call

aten = torch.ops.aten


def _axes_of_cat(axes: Axes, call: Call) -> Dims:
    # An empty vector may be concatenated with anything.
    sources = [axes.values[n] for n in call["tensors"] if tuple(n.meta["val"].shape) != (0,)]
    d = call["dim"] % len(sources[0])
    result = list(sources[0])
    for other in sources[1:]:
        for i, axis in enumerate(other):
            if i != d:
                result[i] = join(result[i], axis)
    parts = [s[d] for s in sources]
    if any(p is DYNAMIC for p in parts):
        for part in parts:
            pin(part, "it is joined to a dimension whose size is known only when the program runs")
        result[d] = DYNAMIC
    else:
        result[d] = sum_of([Atom(1, "a single index that others are joined to") if p == ONE else p for p in parts])
    return tuple(result)


def _known_of_cat(state: State, call: Call) -> Known | None:
    node, dim = call.node, call["dim"] % call.rank
    # What a past is joined to in order to give the present tells what the past was. An empty vector may be anywhere.
    parts = [n for n in call["tensors"] if state.past.get(n) is not node and tuple(n.meta["val"].shape) != (0,)]
    known = [state.get(n) for n in parts]
    if not isinstance(call.value.shape[dim], int):
        if any(k is None for k in known):
            return None
        known = [uniform(k, [dim]) for k in known]
        mask, values = known[0].mask, known[0].values
        for other in known[1:]:
            mask = mask & other.mask & (values == other.values)
        return Known(*torch.broadcast_tensors(values, mask))
    if all(k is None for k in known):
        return None
    sizes = list(torch.broadcast_shapes(*(
        [1 if d == dim else s for d, s in enumerate(k.values.shape)] for k in known if k is not None
    )))  # fmt: skip
    values, masks = [], []
    for n, k in zip(parts, known, strict=True):
        size = [n.meta["val"].shape[dim] if d == dim else s for d, s in enumerate(sizes)]
        nothing = k is None
        values.append(torch.zeros(size, dtype=call.value.dtype) if nothing else k.values.expand(size))
        masks.append(torch.zeros(size, dtype=torch.bool) if nothing else k.mask.expand(size))
    return Known(torch.cat(values, dim), torch.cat(masks, dim))


def _axes_of_stack(axes: Axes, call: Call) -> Dims:
    result = broadcast([axes.values[n] for n in call["tensors"]])
    result.insert(call["dim"] % call.rank, fresh_axis(len(call["tensors"]), "it numbers what was stacked"))
    return tuple(result)


def _axes_of_pad(axes: Axes, call: Call) -> Dims:
    dims, pads = list(axes.values[call["self"]]), call["pad"]
    for i in range(0, len(pads), 2):
        d = len(dims) - 1 - i // 2
        if pads[i] != 0 or pads[i + 1] != 0:
            pin(dims[d], "it is padded")
            dims[d] = fresh_axis(call.value.shape[d], "it is padded")
    return tuple(dims)


def _known_of_pad(state: State, call: Call) -> Known | None:
    known, pads = state.get(call["self"]), call["pad"]
    if known is None or not any(pads):
        return known
    padded = [known.values.ndim - 1 - i // 2 for i in range(0, len(pads), 2) if pads[i] or pads[i + 1]]
    known = uniform(known, padded)
    if call.get("mode") not in (None, "constant"):
        return known
    return Known(known.values, known.mask & (known.values == (call["value"] or 0)))


def _axes_of_repeat(axes: Axes, call: Call) -> Dims:
    source, counts = axes.values[call["self"]], call["repeats"]
    offset = len(counts) - len(source)
    dims = []
    for d, count in enumerate(counts):
        if d >= offset and count == 1:
            dims.append(source[d - offset])
            continue
        if d >= offset:
            pin(source[d - offset], "it is repeated")
        dims.append(fresh_axis(call.value.shape[d], "it is repeated"))
    return tuple(dims)


register(aten.cat.default, aten.concat.default, axes=_axes_of_cat, known=_known_of_cat)
register(aten.stack.default, axes=_axes_of_stack)
register(aten.pad.default, aten.constant_pad_nd.default, axes=_axes_of_pad, known=_known_of_pad)
register(aten.repeat.default, axes=_axes_of_repeat)
