"""Scaled dot product attention, with query heads that may share their keys and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxc.analysis.axis import ONE, Atom, give_role, pin, resolve, unify
from fxc.analysis.constants import Known, State, either, uniform, vanishes
from fxc.analysis.dims import Axes, Dims, Link, Site, broadcast, join, pinned
from fxc.analysis.operators.select import index_constant
from fxc.analysis.operators.table import Dead, MaskOf, Relink, register
from fxc.ir.call import Call
from fxc.ir.edit import insert

aten = torch.ops.aten


def _axes(axes: Axes, call: Call) -> Dims:
    query, key, value = (axes.values[call[name]] for name in ("query", "key", "value"))
    if len(query) < 3:
        return pinned(axes, call, f"{call.name} without a batch")
    if call["enable_gqa"] and key[-3].size != value[-3].size:
        return pinned(axes, call, "its keys and values have different numbers of heads")
    width = join(query[-1], key[-1])
    axes.sites.append(Site(call.node, width, ((0, len(query) - 1), (1, len(key) - 1))))
    length = join(key[-2], value[-2])
    pin(length, "it is attended over")
    if call["is_causal"]:
        pin(query[-2], "its indices are places")
    batch = list(query[:-2])
    shared = call["enable_gqa"] and query[-3].size != key[-3].size
    others = [list(d[:-3]) + ([] if shared else [d[-3]]) for d in (key, value)]
    if shared:
        joined = join(key[-3], value[-3])
        index = torch.arange(key[-3].size).repeat_interleave(query[-3].size // key[-3].size)
        result = Atom(query[-3].size)
        unify(result, query[-3])
        give_role(joined, "kv_head")
        if isinstance(resolve(result), Atom):
            axes.links.append(Link(call.node, resolve(result), joined, index))
        else:
            pin(joined, "its query heads are divided")
            pin(result, "its heads share keys in another way than they are divided")
        batch = broadcast([batch, [*broadcast(others), ONE]])
    else:
        batch = broadcast([batch, *others])
    give_role(batch[-1], "head")
    for axis in (width, value[-1]):
        give_role(axis, "head_dim")
    if isinstance(call["attn_mask"], fx.Node):
        broadcast([[*batch, query[-2], length], axes.values[call["attn_mask"]]])
    return (*batch, query[-2], value[-1])


def _known(state: State, call: Call) -> Known | None:
    """A constant value is passed on: the weights add up to one. With a mask they may be all zero, after dropout they are
    others, and only zero passes."""
    known = state.get(call["value"])
    if known is None or call.rank < 3:
        return None
    known = uniform(known, [known.values.ndim - 2])
    heads, given = call.value.shape[-3], known.values.shape[-3]
    if 1 < given < heads:
        known = known.map(lambda t: t.repeat_interleave(heads // given, -3))
    return known if call["attn_mask"] is None and not call["dropout_p"] else Known(known.values, known.zeros())


def _dead(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    key = vanishes(call["key"], -1, known)
    heads = call.value.shape[-3] if call.rank > 2 else 1
    if key is not None and key.ndim > 1 and 1 < key.shape[-2] < heads:
        key = key.repeat_interleave(heads // key.shape[-2], -2)
    return Dead(either(site.axis.size, vanishes(call["query"], -1, known), key))


def _keep_scale(axes: Axes, call: Call, mask_of: MaskOf) -> bool:
    """It divides by the square root of the width that it had, also when the width shrinks."""
    width = axes.values[call["query"]][-1]
    if mask_of(width) is None or call["scale"] is not None:
        return False
    call.set("scale", resolve(width).size ** -0.5)
    return True


def _relink(axes: Axes, call: Call, what: Relink) -> fx.Node | None:
    """Where heads share keys and values unevenly, those are looked up for each head."""
    if what.is_even:
        return None
    for name in ("key", "value"):
        source = call[name]
        index = index_constant(axes, call.node, what.index)
        selected = insert(
            axes.program, aten.index_select.default, (source, len(call.shape_of(name)) - 3, index),
            before=call.node, by="dead_structure", fqn=call.node.meta.get("fqn", ""),
        )  # fmt: skip
        call.set(name, selected)
    call.node.kwargs = {k: v for k, v in call.node.kwargs.items() if k != "enable_gqa"}
    return call.node


register(
    aten.scaled_dot_product_attention.default, axes=_axes, known=_known, dead=_dead, resize=_keep_scale, relink=_relink
)  # fmt: skip
