"""Parts of a value, by place or by number; a constant list of numbers links the copies to what they are copies of."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxc.analysis.axis import DYNAMIC, ONE, Atom, Mismatch, give_role, pin, split, unify
from fxc.analysis.constants import Known, State, compute, uniform
from fxc.analysis.dims import Axes, Dims, Link, by_spec, fresh_axis, piece, pinned
from fxc.analysis.operators.table import MaskOf, Relink, register
from fxc.ir.call import Call
from fxc.ir.edit import constant, free_name, read
from fxc.ir.program import Program, users_of

aten = torch.ops.aten
LOOKED_UP = "it is looked up by number"


# ----------------------------------------------------------------------------------------------------------------- slice


def _axes_of_slice(axes: Axes, call: Call) -> Dims:
    dims = list(axes.values[call["self"]])
    d, start, end, step = call["dim"] % len(dims), call["start"], call["end"], call["step"]
    size, wanted = call.shape_of("self")[d], call.value.shape[d]
    if not isinstance(size, int) or not isinstance(wanted, int) or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        pin(dims[d], "it is cut at a place known only when the program runs")
        dims[d] = fresh_axis(wanted, "it is cut at a place known only when the program runs")
        return tuple(dims)
    first, last = _bounds(start, end, size)
    try:
        if step == 1:
            dims[d] = piece(dims[d], first, max(first, last))
        else:
            if size % step or wanted != size // step:
                raise Mismatch
            dims[d], phase = split(dims[d], size // step)
            pin(phase, f"every {step}th of it is taken")
    except Mismatch:
        pin(dims[d], "it is cut within a part")
        dims[d] = fresh_axis(wanted, "it is cut within a part")
    return tuple(dims)


def _bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    first, last = 0 if start is None else start, size if end is None else end
    return tuple(min(max(i + size if i < 0 else i, 0), size) for i in (first, last))


def _known_of_slice(state: State, call: Call) -> Known | None:
    known, dim = state.get(call["self"]), call["dim"]
    if known is None or known.values.shape[dim] == 1:
        return known
    if any(isinstance(call[n], fx.Node) for n in ("start", "end", "step")) or not isinstance(call.value.shape[dim], int):
        return uniform(known, [dim % known.values.ndim])
    return known.map(lambda t: compute(state, call, t))


def _resize_slice(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    dim, start, end, step = call["dim"] % len(axes.values[call["self"]]), call["start"], call["end"], call["step"]
    mask = mask_of(axes.values[call["self"]][dim])
    if mask is None or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        return False
    first, last = _bounds(start, end, len(mask))
    # Of every step-th index all are of one residue, of which the axis says that it stays whole.
    bounds = (int(mask[:first].sum()), int(mask[:last].sum())) if step == 1 else (first, int(mask.sum()))
    call.become(aten.slice.Tensor, call["self"], dim, *bounds, step)
    return True


register(aten.slice.Tensor, axes=_axes_of_slice, known=_known_of_slice, resize=_resize_slice)


# ----------------------------------------------------------------------------------------------------- pieces, one by one


def _axes_of_split(axes: Axes, call: Call) -> tuple[Dims, ...]:
    dims = axes.values[call["self"]]
    d = call["dim"] % len(dims)
    results, end = [], 0
    for part in call.value:
        size = part.shape[d]
        try:
            if not isinstance(size, int) or dims[d] is DYNAMIC:
                raise Mismatch
            end += size
            cut = piece(dims[d], end - size, end)
        except Mismatch:
            pin(dims[d], "it is cut within a part")
            cut = fresh_axis(size, "it is cut within a part")
        if size == 1:
            pin(dims[d], "it is cut to single indices")
        results.append((*dims[:d], cut, *dims[d + 1 :]))
    return tuple(results)


def _known_of_split(state: State, call: Call) -> list[Known | None] | None:
    known, dim = state.get(call["self"]), call["dim"]
    if known is None:
        return None
    sizes = [part.shape[dim] for part in call.value]
    if known.values.shape[dim] == 1:
        return [known] * len(sizes)
    if not all(isinstance(s, int) for s in sizes):
        return None
    return [Known(v, m) for v, m in zip(known.values.split(sizes, dim), known.mask.split(sizes, dim), strict=True)]


def _resize_split(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    parts = axes.values[call.node]
    d = call["dim"] % len(parts[0])
    masks = [mask_of(part[d]) for part in parts]
    if all(mask is None for mask in masks):
        return False
    sizes = [v.shape[d] if mask is None else int(mask.sum()) for mask, v in zip(masks, call.value, strict=True)]
    call.become(aten.split_with_sizes.default, call["self"], sizes, d)
    return True


register(
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes,
    axes=_axes_of_split, known=_known_of_split, resize=_resize_split,
)  # fmt: skip


def _axes_of_unbind(axes: Axes, call: Call) -> Any:
    dims = list(axes.values[call["self"]])
    pin(dims.pop(call["dim"] % len(dims)), "its indices are taken one by one")
    return tuple(dims) if isinstance(call.value, Tensor) else tuple(tuple(dims) for _ in call.value)


def _known_of_unbind(state: State, call: Call) -> list[Known] | None:
    known, dim = state.get(call["self"]), call["dim"]
    if known is None:
        return None
    whole = known.values.shape[dim] == 1
    return [known.map(lambda t, i=i: t.select(dim, 0 if whole else i)) for i in range(len(call.value))]


def _known_of_select(state: State, call: Call) -> Known | None:
    known, dim, index = state.get(call["self"]), call["dim"], call["index"]
    if known is None:
        return None
    whole = known.values.shape[dim] == 1
    if not whole and not isinstance(index, int):
        return None
    return known.map(lambda t: t.select(dim, 0 if whole else index))


register(aten.unbind.int, axes=_axes_of_unbind, known=_known_of_unbind)
register(aten.select.int, axes=_axes_of_unbind, known=_known_of_select)


def _axes_of_getitem(axes: Axes, call: Call) -> Dims:
    parts, number = call.node.args
    return axes.values[parts][number]


def _known_of_getitem(state: State, call: Call) -> Known | None:
    parts, number = call.node.args
    known = state.found.get(parts)
    return known[number] if isinstance(known, list) else None


register(operator.getitem, axes=_axes_of_getitem, known=_known_of_getitem)


# ----------------------------------------------------------------------------------------------------------- by an index


def _axes_of_index(axes: Axes, call: Call) -> Dims:
    """x[i, :, j]: dimensions that are looked up by number, at the place of the first where they are neighbours."""
    source, indices = axes.values[call["self"]], list(call["indices"])
    looked_up = [d for d, i in enumerate(indices) if i is not None]
    for d in looked_up:
        pin(source[d], LOOKED_UP)
    rank = max(indices[d].meta["val"].ndim for d in looked_up)
    if any(indices[d].meta["val"].dtype == torch.bool for d in looked_up):
        return pinned(axes, call, "it is chosen by a mask")
    for d in looked_up:
        for axis in axes.values[indices[d]]:
            pin(axis, "it is an index")
    others = [a for d, a in enumerate(source) if d not in looked_up]
    place = _place(looked_up)
    chosen = [fresh_axis(s, LOOKED_UP) for s in call.value.shape[place : place + rank]]
    return (*others[:place], *chosen, *others[place:])


def _place(looked_up: list[int]) -> int:
    """Where the dimensions of the indices stand in the result."""
    together = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    return looked_up[0] if together else 0


def _known_of_index(state: State, call: Call) -> Known | None:
    known, indices = state.get(call["self"]), call["indices"]
    if known is None:
        return None
    looked_up = [d for d, i in enumerate(indices) if i is not None]
    known = uniform(known, looked_up)
    rank = max(indices[d].meta["val"].ndim for d in looked_up)
    if any(indices[d].meta["val"].dtype == torch.bool for d in looked_up):
        return None
    place = _place(looked_up)
    others = [s for d, s in enumerate(known.values.shape) if d not in looked_up]
    return known.map(lambda t: t.reshape(*others[:place], *[1] * rank, *others[place:]))


register(aten.index.Tensor, axes=_axes_of_index, known=_known_of_index)


def _axes_of_embedding(axes: Axes, call: Call) -> Dims:
    return by_spec(axes, call, "!row d, ... -> ... d", {"row": "its rows are looked up by number"})


def _known_of_embedding(state: State, call: Call) -> Known | None:
    table = state.get(call["weight"])
    if table is None or not table.is_complete:
        return None
    return uniform(table, [0]).map(lambda t: t.reshape(*[1] * (call.rank - 1), -1))


register(aten.embedding.default, axes=_axes_of_embedding, known=_known_of_embedding)


# ---------------------------------------------------------------------------------------------------- copies of indices


def index_constant(axes: Axes, node: fx.Node, index: Tensor) -> fx.Node:
    """A constant that says of which head's keys and values each head reads."""
    program: Program = axes.program
    name = f"{node.meta.get('fqn') or node.name}.kv_index"
    # Keys and values are indexed alike.
    if (same := program.constants.get(name)) is not None and torch.equal(same, index):
        return read(program, name, before=node)
    return constant(program, free_name(program, name), index, before=node)


def _axes_of_index_select(axes: Axes, call: Call) -> Dims:
    dims = list(axes.values[call["self"]])
    d, index = call["dim"] % len(dims), call["index"]
    numbers = axes.program.constants.get(index.target) if index.op == "get_attr" else None
    if numbers is None or numbers.is_meta or dims[d] in (ONE, DYNAMIC) or not _only_selects(axes.program, index):
        pin(dims[d], LOOKED_UP)
        dims[d] = fresh_axis(call.value.shape[d], LOOKED_UP)
        return tuple(dims)
    result = Atom(len(numbers)) if len(numbers) > 1 else ONE
    if result is ONE:
        pin(dims[d], "one of it is looked up by number")
    else:
        axes.links.append(Link(call.node, result, dims[d], numbers))
        unify(axes.values[index][0], result)
        give_role(dims[d], "kv_head")
    dims[d] = result
    return tuple(dims)


def _only_selects(program: Program, index: fx.Node) -> bool:
    """Whether a constant vector is nothing but a list of indices, which may be numbered anew."""
    users = users_of(program, index.target)
    return index.meta["val"].ndim == 1 and all(
        user.target is aten.index_select.default and Call(user)["self"].target != index.target for user in users
    )


def _known_of_index_select(state: State, call: Call) -> Known | None:
    known, index, dim = state.get(call["self"]), state.get(call["index"]), call["dim"]
    if known is None or known.values.shape[dim] == 1:
        return known
    if index is None or not index.is_complete:
        return uniform(known, [dim % known.values.ndim])
    return known.map(lambda t: t.index_select(dim, index.values))


def _relink_index_select(axes: Axes, call: Call, what: Relink) -> None:
    """The constant itself is cut with the axis that it makes, so that here only its numbers change."""
    whole = torch.zeros_like(what.link.index)
    whole[what.stays] = what.index
    axes.program.constants[call["index"].target] = whole


register(
    aten.index_select.default, axes=_axes_of_index_select, known=_known_of_index_select, relink=_relink_index_select
)  # fmt: skip


def _axes_of_repeat_interleave(axes: Axes, call: Call) -> Dims:
    dims, d, repeats = list(axes.values[call["self"]]), call["dim"], call["repeats"]
    if d is None or not isinstance(repeats, int) or dims[d] is DYNAMIC:
        return pinned(axes, call, call.name)
    if dims[d] == ONE:
        dims[d] = fresh_axis(repeats)
        return tuple(dims)
    index = torch.arange(dims[d].size).repeat_interleave(repeats)
    result = Atom(len(index))
    axes.links.append(Link(call.node, result, dims[d], index))
    give_role(dims[d], "kv_head")
    dims[d] = result
    return tuple(dims)


def _known_of_repeat_interleave(state: State, call: Call) -> Known | None:
    known, dim, repeats = state.get(call["self"]), call["dim"], call["repeats"]
    if known is None or dim is None or not isinstance(repeats, int):
        return None
    return known if known.values.shape[dim] == 1 else known.map(lambda t: t.repeat_interleave(repeats, dim))


def _resize_repeat_interleave(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    """Of one index. Several of them are linked to what they are copies of, and counted there."""
    dim = call["dim"]
    if dim is None or call.shape_of("self")[dim] != 1 or (mask := mask_of(axes.values[call.node][dim])) is None:
        return False
    call.set("repeats", int(mask.sum()))
    return True


def _relink_repeat_interleave(axes: Axes, call: Call, what: Relink) -> fx.Node:
    if what.is_even:
        call.set("repeats", what.each)
        call.node.kwargs = {k: v for k, v in call.node.kwargs.items() if k == "dim"}
    else:
        index = index_constant(axes, call.node, what.index)
        call.become(aten.index_select.default, call["self"], call["dim"], index)
    return call.node


register(
    aten.repeat_interleave.self_int, axes=_axes_of_repeat_interleave, known=_known_of_repeat_interleave,
    resize=_resize_repeat_interleave, relink=_relink_repeat_interleave,
)  # fmt: skip
