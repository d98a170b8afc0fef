"""Slice a program: given which indices of which atoms stay, cut every constant, and every size that the graph spells out.

%5: f32[s0, 4, 16] = aten.reshape(%4, [%1, 4, 16])          ->  %5: f32[s0, 3, 16] = aten.reshape(%4, [%1, 3, 16])
%7: (f32[s0, 8], f32[s0, 8]) = aten.chunk(%6, 2, -1)        ->  %7: ... = aten.split_with_sizes(%6, [8, 6], -1)
%9: ... = aten.conv2d(%8, @w, @b, [1, 1], [1, 1], [1, 1], 16)  ->  ... 12)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxc.analysis.axis import ONE, Atom, Axis, atoms, kept, resolve
from fxc.analysis.liveness import CONVOLUTIONS
from fxc.analysis.rules import Axes, Link
from fxc.ir.edit import constant, free_name, insert, read
from fxc.ir.infer import fake_constant, fake_mode_of, infer
from fxc.ir.program import Program, users_of

aten = torch.ops.aten
_SIZES = {
    aten.reshape.default: 1, aten.view.default: 1, aten._unsafe_view.default: 1, aten.expand.default: 1,
    aten.broadcast_to.default: 1, aten.zeros.default: 0, aten.ones.default: 0, aten.full.default: 0,
    aten.new_zeros.default: 1, aten.new_ones.default: 1, aten.new_full.default: 1,
}  # fmt: skip
"""Operators that spell out the size of their result, and in which argument."""
_SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}


def shrink(axes: Axes, alive: dict[Atom, Tensor], folds: dict[fx.Node, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Remove from the program of `axes` the indices that are not `alive`, after adding to the biases of consumers what their
    constants (`folds`) contribute there. Returns for each input that became smaller: dimension -> the indices that stay."""
    program = axes.program
    for node, values in folds.items():
        _fold(axes, node, values, alive)
    touched = {_follow(axes, link, alive) for link in axes.links}
    masks: dict[Axis, Tensor] = {}

    def mask_of(axis: Axis) -> Tensor | None:
        axis = resolve(axis)
        if axis not in masks:
            masks[axis] = kept(axis, alive) if any(a in alive for a in atoms(axis)) else None
        return masks[axis]

    for fqn, dims in axes.constants.items():
        for dim, axis in enumerate(dims):
            if (mask := mask_of(axis)) is not None and fqn in program.constants:
                cut = program.constants[fqn].index_select(dim, mask.nonzero().flatten())
                program.constants[fqn] = cut.contiguous()
    inputs: dict[str, dict[int, Tensor]] = {}
    mode, changed = fake_mode_of(program.graph), set[fx.Node]()
    names = {node: declared.name for node, declared in zip(program.placeholders, program.signature.inputs, strict=True)}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            tensor = program.constants[node.target]
            if tuple(tensor.shape) != tuple(value.shape):
                node.meta["val"] = fake_constant(mode, tensor)
                changed.add(node)
        elif node.op == "placeholder":
            cut = {d: m.nonzero().flatten() for d, a in enumerate(axes.values[node]) if (m := mask_of(a)) is not None}
            if cut:
                inputs[names[node]] = cut
                shape = [len(cut[d]) if d in cut else s for d, s in enumerate(value.shape)]
                with mode:
                    node.meta["val"] = torch.empty(shape, dtype=value.dtype, device="cpu")
                changed.add(node)
        elif node.op == "call_function":
            rewritten = _rewrite(axes, node, mask_of) or node in touched
            if rewritten or any(n in changed for n in node.all_input_nodes):
                node.meta["val"] = infer(mode, node.target, node.args, node.kwargs)
                changed.add(node)
    return inputs


def _rewrite(axes: Axes, node: fx.Node, mask_of: Any) -> bool:
    """Derive the sizes among the arguments of `node` anew. Whether one of them changed."""
    target, dims = node.target, axes.values.get(node, ())
    if target in _SIZES:
        place, sizes = _SIZES[target], [_count(a, s, mask_of) for a, s in zip(dims, node.meta["val"].shape, strict=True)]
        before = list(node.args[place])
        # A size known only at run time stays as it was written.
        after = [b if s is None else s for b, s in zip(before, sizes, strict=True)]
        if any(mask_of(a) is not None for a in dims):
            node.args = (*node.args[:place], after, *node.args[place + 1 :])
            return True
        return False
    if target in _SPLITS:
        d = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(dims[0])
        if all(mask_of(part[d]) is None for part in dims):
            return False
        sizes = [_count(part[d], v.shape[d], mask_of) for part, v in zip(dims, node.meta["val"], strict=True)]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, d), {}
        return True
    if target is aten.slice.Tensor:
        return _rewrite_slice(axes, node, mask_of)
    if target is aten.unflatten.int:
        d, sizes = node.args[1] % len(axes.values[node.args[0]]), node.args[2]
        parts = dims[d : d + len(sizes)]
        if all(mask_of(a) is None for a in parts):
            return False
        after = [s if (c := _count(a, s, mask_of)) is None else c for a, s in zip(parts, sizes, strict=True)]
        node.args = (*node.args[:2], after)
        return True
    if target in CONVOLUTIONS and len(node.args) > 6 and node.args[6] > 1:
        channels, inner = node.args[0].meta["val"].shape[1], node.args[1].meta["val"].shape[1]
        if channels // inner == node.args[6]:
            return False
        node.args = (*node.args[:6], channels // inner)
        return True
    if target is aten.repeat_interleave.self_int and node.args[0].meta["val"].shape[_dim(node, 2)] == 1:
        # Several of them are linked to what they are copies of, and counted there.
        if mask_of(dims[_dim(node, 2)]) is None:
            return False
        node.args = (node.args[0], int(mask_of(dims[_dim(node, 2)]).sum()), *node.args[2:])
        return True
    if target in _SQUEEZES and any(mask_of(a) is not None for a in dims):
        # Of the dimensions that are 1 now, only those go that were before.
        source = axes.values[node.args[0]]
        given = node.args[1] if len(node.args) > 1 else list(range(len(source)))
        gone = [d % len(source) for d in (given if isinstance(given, (list, tuple)) else [given])]
        gone = [d for d in gone if resolve(source[d]) == ONE]
        node.target, node.args = (aten.squeeze.dims, (node.args[0], gone)) if gone else (aten.alias.default, node.args[:1])
        return True
    if target is aten.scaled_dot_product_attention.default:
        return _keep_scale(axes, node, mask_of)
    return False


def _dim(node: fx.Node, place: int) -> int:
    return node.args[place] if len(node.args) > place else node.kwargs["dim"]


def _count(axis: Axis, size: Any, mask_of: Any) -> int | None:
    """How many indices stay, None of a size that is a symbol."""
    if not isinstance(size, int):
        return None
    mask = mask_of(axis)
    return size if mask is None else int(mask.sum())


def _rewrite_slice(axes: Axes, node: fx.Node, mask_of: Any) -> bool:
    source, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])[:5]
    dim %= len(axes.values[source])
    mask = mask_of(axes.values[source][dim])
    if mask is None or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        return False
    size = len(mask)
    first, last = (0 if start is None else start), (size if end is None else end)
    first, last = (min(max(i + size if i < 0 else i, 0), size) for i in (first, last))
    if (step or 1) == 1:
        bounds = int(mask[:first].sum()), int(mask[:last].sum())
    else:
        # Every step-th index: all of them are of one residue, of which the axis says that it stays whole.
        bounds = first, int(mask.sum())
    node.args = (source, dim, *bounds, step or 1)
    return True


def _keep_scale(axes: Axes, node: fx.Node, mask_of: Any) -> bool:
    """Attention divides by the square root of the width that it had, also when the width shrinks."""
    width = axes.values[node.args[0]][-1]
    if mask_of(width) is None or node.kwargs.get("scale") is not None:
        return False
    node.kwargs = {**node.kwargs, "scale": resolve(width).size ** -0.5}
    return True


# ----------------------------------------------------------------------------------------------------------------- constants


def _fold(axes: Axes, node: fx.Node, values: Tensor, alive: dict[Atom, Tensor]) -> None:
    """Add to the bias of the linear or convolution `node` what the constants that go contribute to it."""
    program = axes.program
    site = next(s for s in axes.sites if s.node is node)
    mask = kept(site.axis, alive)
    weight = program.constants[node.args[1].target]
    if node.target in CONVOLUTIONS:
        groups, inner = values.shape
        gone = torch.where(mask, 0, values)  # [groups, inner]
        sums = weight.double().reshape(groups, -1, inner, weight[0, 0].numel()).sum(3)
        added = (sums * gone[:, None]).sum(2).flatten()
    else:
        added = weight.double() @ torch.where(mask, 0, values)
    if not added.any():
        return
    bias = node.args[2] if len(node.args) > 2 else None
    module, _, own = node.args[1].target.rpartition(".")
    own = "bias" if own == "weight" else f"{own}_bias"
    name = bias.target if bias is not None else f"{module}.{own}" if module else own
    total = (added if bias is None else program.constants[bias.target].double() + added).to(weight.dtype)
    if bias is not None and len(users_of(program, bias.target)) == 1 and bias.target not in program.aliases.values():
        program.constants[bias.target] = total
        return
    new = constant(program, free_name(program, name), total, before=node)
    axes.constants[new.target] = (axes.values[node][1 if node.target in CONVOLUTIONS else -1],)
    axes.values[new] = axes.constants[new.target]
    node.args = (*node.args[:2], new, *node.args[3:])


# ---------------------------------------------------------------------------------------------------------------------- links


def _follow(axes: Axes, link: Link, alive: dict[Atom, Tensor]) -> fx.Node | None:
    """Make the copies that stay read what stays. Returns the node whose type is to be inferred anew, if there is one."""
    result, node = resolve(link.result), link.node
    stays = kept(result, alive)
    there = kept(link.source, alive)
    if stays.all() and there.all():
        return None
    index = (there.cumsum(0) - 1)[link.index[stays]]
    count = int(there.sum())
    if node.target is aten.index_select.default:
        # The constant itself is cut with the axis that it makes, so that here only its numbers change.
        whole = torch.zeros_like(link.index)
        whole[stays] = index
        axes.program.constants[node.args[2].target] = whole
        return None
    each = len(index) // max(count, 1)
    is_even = torch.equal(index, torch.arange(count).repeat_interleave(each))
    if node.target is aten.repeat_interleave.self_int:
        if is_even:
            node.args = (node.args[0], each, *node.args[2:])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k == "dim"}
            return node
        node.args = (node.args[0], _dim(node, 2), _index(axes, node, index))
        node.target, node.kwargs = aten.index_select.default, {}
        return node
    if node.target is aten.scaled_dot_product_attention.default:
        if is_even:
            return None
        selected = [
            insert(
                axes.program, aten.index_select.default, (source, source.meta["val"].ndim - 3, _index(axes, node, index)),
                before=node, by="dead_structure", fqn=node.meta.get("fqn", ""),
            )
            for source in node.args[1:3]
        ]  # fmt: skip
        node.args = (node.args[0], *selected, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}
        return node
    copies = resolve(link.copies)
    if is_even:
        if each < copies.size:
            alive[copies] = torch.arange(copies.size) < each
        return None
    unsqueeze = node.args[0].args[0]
    source, dim = unsqueeze.args[0], unsqueeze.args[1] % unsqueeze.meta["val"].ndim - 1
    node.target, node.args = aten.index_select.default, (source, dim, _index(axes, node, index))
    return node


def _index(axes: Axes, node: fx.Node, index: Tensor) -> fx.Node:
    program: Program = axes.program
    name = f"{node.meta.get('fqn') or node.name}.kv_index"
    # Keys and values are indexed alike.
    if (same := program.constants.get(name)) is not None and torch.equal(same, index):
        return read(program, name, before=node)
    return constant(program, free_name(program, name), index, before=node)
