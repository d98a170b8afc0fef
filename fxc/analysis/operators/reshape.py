"""The same data in other dimensions, copies along new ones, and tensors of one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxc.analysis.axis import DYNAMIC, ONE, Atom, Axis, give_role, pin, product_of, resolve, unify
from fxc.analysis.constants import Known, State, uniform, widened
from fxc.analysis.dims import Axes, Dims, Link, broadcast, fresh, fresh_axis
from fxc.analysis.operators.pointwise import axes_of_first
from fxc.analysis.operators.select import index_constant
from fxc.analysis.operators.table import MaskOf, Relink, register
from fxc.analysis.shapes import regroup
from fxc.ir.call import Call

aten = torch.ops.aten


def count(axis: Axis, size: Any, mask_of: MaskOf) -> int | None:
    """How many indices stay, None of a size that is a symbol."""
    if not isinstance(size, int):
        return None
    mask = mask_of(axis)
    return size if mask is None else int(mask.sum())


def resize(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    """Of an operator that spells out the size of its result."""
    dims, name = axes.values[call.node], "shape" if "shape" in call else "size"
    if all(mask_of(a) is None for a in dims):
        return False
    sizes = [count(a, s, mask_of) for a, s in zip(dims, call.value.shape, strict=True)]
    # A size known only at run time stays as it was written.
    call.set(name, [before if s is None else s for before, s in zip(call[name], sizes, strict=True)])
    return True


# --------------------------------------------------------------------------------------------------------------- reshape


def _axes(axes: Axes, call: Call) -> Dims:
    """Reshape, flatten, squeeze, unsqueeze: groups of dimensions whose products are the same."""
    source, value = axes.values[call["self"]], call.value
    result: list[Axis] = [ONE] * value.ndim
    for ins, outs in regroup(call.shape_of("self"), value.shape):
        if any(source[i] is DYNAMIC for i in ins) or any(not isinstance(value.shape[o], int) for o in outs):
            if len(ins) > 1 or len(outs) > 1:
                why = "it is merged with a dimension whose size is known only when the program runs"
                for i in ins:
                    pin(source[i], why)
                for o in outs:
                    result[o] = fresh_axis(value.shape[o], why)
            else:
                result[outs[0]] = DYNAMIC
            continue
        if len(outs) == 1:
            result[outs[0]] = _merge(axes, call, [source[i] for i in ins])
            continue
        for o in outs:
            result[o] = fresh_axis(value.shape[o])
        unify(product_of(*(source[i] for i in ins)), product_of(*(result[o] for o in outs)))
    return tuple(result)


def _axes_of_reshape_as(axes: Axes, call: Call) -> Dims:
    return tuple(broadcast([_axes(axes, call), axes.values[call["other"]]]))


def _merge(axes: Axes, call: Call, factors: list[Axis]) -> Axis:
    """Heads that were expanded to several copies and are numbered anew are linked to what they copy, for they may die one
    by one; everything else is a product."""
    if len(factors) == 2 and resolve(factors[0]) != ONE:
        copies = resolve(factors[1])
        expand = axes.copies.get(copies) if isinstance(copies, Atom) else None
        if expand is not None and _repeats_heads(expand, call):
            result = Atom(factors[0].size * copies.size)
            index = torch.arange(factors[0].size).repeat_interleave(copies.size)
            axes.links.append(Link(call.node, result, factors[0], index, copies))
            give_role(factors[0], "kv_head")
            return result
    return product_of(*factors)


def _repeats_heads(expand: fx.Node, call: Call) -> bool:
    """Whether this reshape of the expand of an unsqueeze does what repeat_interleave does, and nothing else."""
    unsqueeze = Call(expand)["self"]
    if expand is not call["self"] or len(expand.users) != 1 or unsqueeze.target is not aten.unsqueeze.default:
        return False
    unsqueezed = Call(unsqueeze)
    before, between, after = (list(map(str, n.meta["val"].shape)) for n in (unsqueezed["self"], expand, call.node))
    new = unsqueezed["dim"] % len(between)
    if not 0 < new < len(between) or between[:new] + between[new + 1 :] != before or len(after) != len(before):
        return False
    return after[: new - 1] + after[new:] == before[: new - 1] + before[new:]


def _known(state: State, call: Call) -> Known | None:
    known = state.get(call["self"])
    if known is None:
        return None
    before, after = call.shape_of("self"), tuple(call.value.shape)
    sizes = [1] * len(after)
    for ins, outs in regroup(before, after):
        is_static = all(isinstance(before[i], int) for i in ins) and all(isinstance(after[o], int) for o in outs)
        if not is_static:
            known = uniform(known, ins)
            continue
        if all(known.values.shape[i] == 1 for i in ins):
            continue
        for i in ins:
            known = widened(known, i, before[i])
        for o in outs:
            sizes[o] = after[o]
    return known.map(lambda t: t.reshape(sizes))


def _resize_unflatten(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    d, sizes = call["dim"] % len(axes.values[call["self"]]), call["sizes"]
    parts = axes.values[call.node][d : d + len(sizes)]
    if all(mask_of(a) is None for a in parts):
        return False
    call.set("sizes", [s if (c := count(a, s, mask_of)) is None else c for a, s in zip(parts, sizes, strict=True)])
    return True


def _resize_squeeze(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    """Of the dimensions that are 1 now, only those go that were before."""
    if all(mask_of(a) is None for a in axes.values[call.node]):
        return False
    source = axes.values[call["self"]]
    given = call["dim"] if "dim" in call else list(range(len(source)))
    gone = [d % len(source) for d in (given if isinstance(given, (list, tuple)) else [given])]
    gone = [d for d in gone if resolve(source[d]) == ONE]
    if gone:
        call.become(aten.squeeze.dims, call["self"], gone)
    else:
        call.become(aten.alias.default, call["self"])
    return True


def _relink(axes: Axes, call: Call, what: Relink) -> fx.Node | None:
    copies = resolve(what.link.copies)
    if what.is_even:
        if what.each < copies.size:
            what.alive[copies] = torch.arange(copies.size) < what.each
        return None
    unsqueeze = Call(Call(call["self"])["self"])
    dim = unsqueeze["dim"] % unsqueeze.rank - 1
    call.become(aten.index_select.default, unsqueeze["self"], dim, index_constant(axes, call.node, what.index))
    return call.node


_RESHAPE = {"axes": _axes, "known": _known, "relink": _relink}
register(aten.reshape.default, aten.view.default, aten._unsafe_view.default, **_RESHAPE, resize=resize)
register(aten.unflatten.int, **_RESHAPE, resize=_resize_unflatten)
register(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, **_RESHAPE, resize=_resize_squeeze)
register(aten.flatten.using_ints, aten.unsqueeze.default, **_RESHAPE)
register(aten.reshape_as.default, aten.view_as.default, **{**_RESHAPE, "axes": _axes_of_reshape_as})


# ---------------------------------------------------------------------------------------------------------------- expand


def _axes_of_expand(axes: Axes, call: Call) -> Dims:
    source, value = axes.values[call["self"]], call.value
    offset = value.ndim - len(source)
    dims = []
    for d, size in enumerate(value.shape):
        axis = source[d - offset] if d >= offset else ONE
        if axis == ONE and isinstance(size, int) and size > 1:
            axis = Atom(size)
            axes.copies[axis] = call.node
        dims.append(axis if axis != ONE else fresh_axis(size))
    return tuple(dims)


def _axes_of_expand_as(axes: Axes, call: Call) -> Dims:
    return tuple(broadcast([axes.values[call["self"]], axes.values[call["other"]]]))


def _known_of_expand(state: State, call: Call) -> Known | None:
    known = state.get(call["self"])
    missing = call.rank - len(call.shape_of("self"))
    return known and known.map(lambda t: t[(None,) * missing])


register(aten.expand.default, aten.broadcast_to.default, axes=_axes_of_expand, known=_known_of_expand, resize=resize)
register(aten.expand_as.default, axes=_axes_of_expand_as, known=_known_of_expand)


# -------------------------------------------------------------------------------------------------------- of one number


def _new(axes: Axes, call: Call) -> Dims:
    """A tensor of the sizes in the arguments: it has the axes of whatever it meets."""
    return fresh(call.value)


def _filled(number: int | None = None) -> Callable[[State, Call], Known | None]:
    """A tensor of one number: `number`, or the argument."""

    def rule(state: State, call: Call) -> Known | None:
        argument = call["fill_value"] if number is None else number
        if not isinstance(argument, (int, float, bool)):
            return None
        values = torch.full((1,) * call.rank, argument, dtype=call.value.dtype)
        return Known(values, torch.ones_like(values, dtype=torch.bool))

    return rule


register(aten.zeros.default, aten.new_zeros.default, axes=_new, known=_filled(0), resize=resize)
register(aten.ones.default, aten.new_ones.default, axes=_new, known=_filled(1), resize=resize)
register(aten.full.default, aten.new_full.default, axes=_new, known=_filled(), resize=resize)
register(aten.zeros_like.default, axes=axes_of_first, known=_filled(0))
register(aten.ones_like.default, axes=axes_of_first, known=_filled(1))
register(aten.full_like.default, axes=axes_of_first, known=_filled())
register(aten.scalar_tensor.default, axes=_new)
