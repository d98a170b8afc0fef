"""Slice a program: given which indices of which atoms stay, cut every constant, and every size that the graph spells out.

%5: f32[s0, 4, 16] = aten.reshape(%4, [%1, 4, 16])          ->  %5: f32[s0, 3, 16] = aten.reshape(%4, [%1, 3, 16])
%7: (f32[s0, 8], f32[s0, 8]) = aten.chunk(%6, 2, -1)        ->  %7: ... = aten.split_with_sizes(%6, [8, 6], -1)
%9: ... = aten.conv2d(%8, @w, @b, [1, 1], [1, 1], [1, 1], 16)  ->  ... 12)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxc.analysis.axis import Atom, Axis, atoms, kept, resolve
from fxc.analysis.dims import Axes, Link
from fxc.analysis.operators import operator_of
from fxc.analysis.operators.table import Relink
from fxc.ir.call import Call
from fxc.ir.edit import constant, free_name
from fxc.ir.infer import fake_constant, fake_mode_of, infer
from fxc.ir.program import users_of


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
            resize = operator_of(node.target).resize
            rewritten = (resize is not None and resize(axes, Call(node), mask_of)) or node in touched
            if rewritten or any(n in changed for n in node.all_input_nodes):
                node.meta["val"] = infer(mode, node.target, node.args, node.kwargs)
                changed.add(node)
    return inputs


# ----------------------------------------------------------------------------------------------------------------- constants


def _fold(axes: Axes, node: fx.Node, values: Tensor, alive: dict[Atom, Tensor]) -> None:
    """Add to the bias of the consumer `node` what the constants that go contribute to it."""
    program, call = axes.program, Call(node)
    site = next(s for s in axes.sites if s.node is node)
    fqn, bias = call["weight"].target, call["bias"]
    weight = program.constants[fqn]
    added = operator_of(node.target).fold(weight, torch.where(kept(site.axis, alive), 0, values))
    if not added.any():
        return
    module, _, own = fqn.rpartition(".")
    own = "bias" if own == "weight" else f"{own}_bias"
    name = bias.target if bias is not None else f"{module}.{own}" if module else own
    total = (added if bias is None else program.constants[bias.target].double() + added).to(weight.dtype)
    if bias is not None and len(users_of(program, bias.target)) == 1 and bias.target not in program.aliases.values():
        program.constants[bias.target] = total
        return
    new = constant(program, free_name(program, name), total, before=node)
    axes.constants[new.target] = (axes.values[call["weight"]][0],)
    axes.values[new] = axes.constants[new.target]
    call.set("bias", new)


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
    each = len(index) // max(count, 1)
    is_even = torch.equal(index, torch.arange(count).repeat_interleave(each))
    return operator_of(node.target).relink(axes, Call(node), Relink(link, stays, index, each, is_even, alive))
