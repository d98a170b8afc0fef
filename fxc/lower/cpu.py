"""Lowering for the CPU: passes from a Program to one that calls what this processor is fast at, the operators fxc_cpu::*."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, fx

from fxc.errors import UsageError
from fxc.ir import edit
from fxc.ir.call import Call
from fxc.ir.check import check
from fxc.ir.names import layer_name
from fxc.ir.program import Program
from fxc.lower import choose, cpu_fusion, cpu_rows, static
from fxc.lower.candidates import (
    FLOAT,
    NATIVE_INT4,
    NATIVE_INT8,
    NATIVE_SPLIT,
    Candidate,
    CpuPlace,
    candidates,
    float_weight,
    held_bytes,
)
from fxc.lower.choose import Choice
from fxc.lower.fusion import activation_after, repeated_heads
from fxc.lower.keep_float import Wish, within
from fxc.lower.remembered import Timing
from fxc.lower.siblings import LayerChoice, Siblings, find_siblings, module_name, relax_views, replace
from fxc.lower.sparse_as_dense import sparse_int4_as_dense, sparse_int8_as_dense
from fxc.mapped import Reading, give_back
from fxc.schemes import int8
from fxc.schemes.scheme import LINEAR, products_for, scheme_of
from fxc_kernels.cpu import native, native_attention, ops
from fxc_kernels.cpu.packed_linear import pack_bfloat16

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_GELU = torch.ops.aten.gelu.default
_TO = torch.ops.aten.to.dtype
# A packed bfloat16 weight halves the time of one row, which is one of the four counts that a layer is timed at.
_PACKED_GAIN = 2**0.25
_UNPACKED = "bf16"
Measure = Callable[[tuple[Candidate, ...], int, int, torch.dtype], Timing]


def lower_cpu(
    program: Program, backend: str = "eager", *, measure: Measure | None = None, bf16: bool = True, keep_float: float = 1.0
) -> tuple[Program, list[LayerChoice]]:
    """Lower `program`, whose constants are on the CPU, for `backend` "eager" or "inductor".

    Returns the lowered program (`fxc.lower.runnable` makes it callable) and a LayerChoice per rewritten node. The given one is
    not changed; constants that no rewritten layer uses are shared with it.

    measure: (forms, N, K, dtype) -> Timing, instead of timing the forms of a layer on this machine; `choose.compressed` for
    the compressed form whatever its time.
    bf16: allow bfloat16 where int8 activations already cost more precision than it does: in the products of attention whose
    query and key come from int8 layers, with inductor in all of it. Values between nodes keep their dtype, and nothing happens
    where the CPU has no bfloat16 instructions.
    keep_float: of the bytes that the smallest forms of all packed layers save, the share that floats may take again; more than
    1 is more than the original had.
    Raises UsageError for an unknown backend or a program on meta.
    """
    if backend not in ("eager", "inductor"):
        raise UsageError(f"unknown CPU backend {backend!r}", hint="use eager or inductor")
    if program.is_on_meta:
        raise UsageError("a program without weights cannot run", where="lowering")
    native.start()
    bf16 = bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    program = program.copy()
    expanded = sparse_int8_as_dense(program) | sparse_int4_as_dense(program)
    if not attention_in_one_call(program) and bf16 and backend == "inductor":
        attention_in_bfloat16(program)
    packs_bf16 = bf16 and backend == "eager"
    copies = [node for node in bfloat16_layers(program) if packs_bf16 and _is_read_elsewhere(program, [node])]
    report, without = lower_layers(program, backend, measure or choose.measured(backend), expanded, copies, keep_float)
    report += static.lower_convolutions(program, packed=backend == "eager")
    report = static.chain(program, report)
    if packs_bf16:
        report += pack_bfloat16_layers(program, without)
    if backend == "eager":
        cpu_fusion.fuse(program)
    relax_views(program)
    if backend == "eager":
        cpu_rows.fuse(program, bf16)
    if backend == "inductor":
        gelu_for_inductor(program)
    edit.sweep(program)
    check(program, lowered=True)
    give_back()
    return program, report


def lower_to_kernels(program: Program, in_floats: bool = False) -> tuple[Program, list[LayerChoice]]:
    """Linear layers with packed weights as calls of the kernels in C++ for this CPU, those that read one activation as one;
    what has none here stays as it is, or with `in_floats` has its weights as numbers. No form is timed: every machine of a
    level makes the same of a program.

    Returns the program, the given one is not changed, and a LayerChoice for each layer of a format that has such a kernel, or
    with `in_floats` of any: its `op` is "unchanged" or "dequantized" where the layer has none, and the reason says why. Raises
    `UsageError` for a program on meta.
    """
    if program.is_on_meta:
        raise UsageError("a program without weights cannot run", where="lowering")
    program, report = program.copy(), []
    forms = {target: form for form in (NATIVE_INT8, NATIVE_SPLIT, NATIVE_INT4) for target in form.targets}
    if in_floats:
        sparse_int8_as_dense(program)
        sparse_int4_as_dense(program)
    for group in find_siblings(program, products_for(LINEAR) if in_floats else forms):
        form, why_not = forms.get(group.target), "the weight is empty" if group.is_empty else None
        if form is None:
            why_not = f"no kernel in C++ for {scheme_of(group.target).label}"
        elif why_not is None:
            why_not = form.why_not(group)
        if why_not and (group.is_empty or not in_floats):
            report += group.choices("unchanged", why_not)
            continue
        chosen = FLOAT if why_not else form
        _write(program, group, Choice(chosen, None, chosen.name, why_not or "in C++"), "inductor")
        report += group.choices(chosen.name, why_not or "in C++")
    relax_views(program)
    edit.sweep(program)
    check(program, lowered=True)
    return program, report


def attention_in_one_call(program: Program) -> bool:
    """Attention that `native_attention` computes is computed by it. Returns whether this machine does that."""
    if torch.cpu._is_amx_tile_supported() or native_attention.why_not():
        return False  # with AMX, torch's own in bfloat16 is not measured against it
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        call = Call(node)
        query, mask = call["query"].meta["val"], call["attn_mask"]
        values = [call[name].meta["val"] for name in ("query", "key", "value")]
        fits = query.dtype in (torch.float32, torch.bfloat16) and all((v.dim(), v.dtype) == (4, query.dtype) for v in values)
        mask_fits = mask is None or mask.meta["val"].dtype in (torch.bool, query.dtype)
        width = query.shape[-1]
        if fits and mask_fits and not call["dropout_p"] and isinstance(width, int) and width % native_attention.WIDTH == 0:
            made = edit.call(program, ops.ATTENTION, node.args, kwargs=node.kwargs, replacing=node, by="lower")
            parts = [repeated_heads(each) for each in made.args[1:3]]
            if all(parts) and parts[0][1:3] == parts[1][1:3]:  # heads that share keys and values read the same ones
                made.args = (made.args[0], *(x for x, *_ in parts), *made.args[3:])
                made.kwargs = {**made.kwargs, "enable_gqa": True}
    edit.sweep(program)
    return True


def attention_in_bfloat16(program: Program) -> None:
    """float32 attention computes in bfloat16 when its query and key are int8 results, whose error is larger."""
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        query, key, value = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        fits = all(t.meta["val"].dtype == torch.float32 for t in (query, key, value))
        if not fits or (mask is not None and mask.meta["val"].dtype != torch.bool):
            continue
        if not (_comes_from_int8(query) and _comes_from_int8(key)):
            continue
        place = {"before": node, "by": "lower", "fqn": node.meta.get("fqn", "")}
        casts = [edit.insert(program, _TO, (t, torch.bfloat16), **place) for t in (query, key, value)]
        mixed = edit.insert(program, ATTENTION, (*casts, *node.args[3:]), kwargs=node.kwargs, **place)
        edit.call(program, _TO, (mixed, torch.float32), replacing=node, by="lower")
    edit.sweep(program)


def _comes_from_int8(node: fx.Node) -> bool:
    """True when every linear layer nearest above `node` quantizes its activations, and there is one."""
    seen, stack, found = set(), [node], False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target in (int8.LINEAR, int8.STATIC):
            found = True
        elif current.target in (LINEAR, int8.WEIGHT_ONLY):
            return False
        else:
            stack.extend(current.all_input_nodes)
    return found


def lower_layers(
    program: Program, backend: str, measure: Measure, expanded: Collection[str], copies: list[fx.Node], keep_float: float
) -> tuple[list[LayerChoice], dict[fx.Node, Choice]]:
    """Layers with packed weights run in the best of their forms, those that read one activation as one. expanded: the names of
    2:4 sparse ones that were made dense; copies: bfloat16 layers whose packing leaves the weight where it is too; keep_float:
    see `fxc.lower.keep_float`. Gives also which of the copies have no room, and why."""
    report = []
    with Reading() as reading:
        groups = find_siblings(program, products_for(LINEAR))
        in_rows = backend == "eager" and cpu_rows.is_likely(program)
        wishes = [_wish(program, group, measure, in_rows) for group in groups if not group.is_empty]
        # Where nothing is compressed nothing bounds what the program may hold.
        wished = [_wish_for_copy(program, node) for node in copies if wishes]
        found = within(wishes + wished, keep_float)
        chosen = iter(found)
        without = {node: each for node, each in zip(copies, found[len(wishes) :]) if each.name == _UNPACKED}
        for group in groups:
            if group.is_empty:
                name, reason = "unchanged", "the weight is empty"
            else:
                choice = next(chosen)
                _write(program, group, choice, backend)
                name, reason = choice.name, choice.reason
                reading.done(each for arguments in group.arguments for each in arguments if isinstance(each, Tensor))
            for each in group.choices(name, reason):
                sparse = "; 2:4 sparse as dense: no CPU kernel" if each.fqn in expanded else ""
                report.append(dataclasses.replace(each, reason=each.reason + sparse))
    return report, without


def _is_read_elsewhere(program: Program, nodes: list[fx.Node]) -> bool:
    """Whether others than `nodes` read the weights of these, as a table does that is tied to a head."""
    weights = {node.args[1].target for node in nodes}
    reads = [node for node in program.graph.find_nodes(op="get_attr") if node.target in weights]
    return any(user not in nodes for read in reads for user in read.users)


def _wish_for_copy(program: Program, node: fx.Node) -> Wish:
    nbytes = program.constants[node.args[1].target].nbytes
    choices = [Choice(FLOAT, None, "bf16 packed", "kept in bfloat16", _PACKED_GAIN), Choice(FLOAT, None, _UNPACKED, "as it is")]
    return Wish(choices, [nbytes, 0], 0)


def _wish(program: Program, group: Siblings, measure: Measure, in_rows: bool) -> Wish:
    """The forms that the group's layers may have, and why. in_rows: whether those in int8 will be one call with others."""
    forms = candidates(group)
    refused = {each: each.why_not(group) for each in forms}
    able = tuple(each for each in forms if refused[each] is None)
    if len(able) == 1:
        why_not = [reason for reason in refused.values() if reason] or [f"no CPU kernel for {scheme_of(group.target).label}"]
        only = Choice(FLOAT, None, FLOAT.name, f"{FLOAT.name}: {'; '.join(why_not)}")
        return Wish([only], [held_bytes(FLOAT, group)], held_bytes(FLOAT, group))
    rows, columns = sum(group.sizes), group.columns
    try:
        timing = measure(able, rows, columns, group.dtype)
    except choose.Busy as why:
        found = [choose.by_memory(able, why)]
    else:
        found = _alternatives(able, timing, rows * columns <= choose.SMALL_LAYER, in_rows)
    found = [dataclasses.replace(each, reason=each.reason + each.form.note(group)) for each in found]
    group.kept.clear()  # what was made of the weights of all layers would be in memory at once
    nbytes = [held_bytes(each.form, group, each.limit is not None) for each in found]
    stays = sum(arguments[1].nbytes for arguments in group.arguments) if _is_read_elsewhere(program, group.nodes) else 0
    return Wish(found, nbytes, held_bytes(FLOAT, group) - stays)


def _alternatives(able: tuple[Candidate, ...], timing: Timing, is_small: bool, in_rows: bool) -> list[Choice]:
    if not in_rows or NATIVE_INT8 not in able:
        return choose.alternatives(able, timing, is_small)
    judged = cpu_rows.as_in_rows(timing, able.index(NATIVE_INT8))
    was, told = (choose.describe(able, each) for each in (judged, timing))
    told += f"; int8 counts {cpu_rows.IN_ROWS:g} of that, in one call with other layers"
    found = choose.alternatives(able, judged, is_small)
    return [dataclasses.replace(each, reason=each.reason.replace(was, told)) for each in found]


def _write(program: Program, group: Siblings, choice: Choice, backend: str) -> None:
    """Put the chosen form in the place of the group's layers."""
    packed = backend == "eager"
    name = module_name(program, group.names[0])
    activation = "none"
    if (choice.form.is_one_call or (packed and group.dtype == torch.float32)) and len(group.nodes) == 1:
        activation, last = activation_after(group.nodes[0], choice.form.absorbs)
    place = CpuPlace(program, group.nodes[0], name, packed, activation)
    dense = None if choice.limit is None else float_weight(group, packed)
    out = choice.form.make(place, group, dense, choice.limit or 0)
    if activation != "none":
        edit.replace(last, out)
        edit.sweep(program)
    else:
        replace(program, group, out)


def bfloat16_layers(program: Program) -> list[fx.Node]:
    """The linear layers whose weight oneDNN could pack."""
    found = []
    for node in program.graph.find_nodes(op="call_function", target=LINEAR):
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        value = program.constants.get(weight.target) if weight.op == "get_attr" else None
        is_bfloat16 = value is not None and value.dtype == torch.bfloat16 and value.numel() > 0
        if is_bfloat16 and (bias is None or bias.op == "get_attr"):
            found.append(node)
    return found


def pack_bfloat16_layers(program: Program, without: Mapping[fx.Node, Choice]) -> list[LayerChoice]:
    """Linear layers that stay bfloat16 get a weight packed by oneDNN, but for those that have no room for it."""
    report = []
    with Reading() as reading:
        for node in bfloat16_layers(program):
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            value, layer = program.constants[weight.target], layer_name(weight.target)
            if choice := without.get(node):
                report.append(LayerChoice(layer, choice.name, choice.reason, *value.shape))
                continue
            packed = edit.constant(program, f"{module_name(program, layer)}.weight", pack_bfloat16(value), node)
            edit.call(program, ops.DENSE_LINEAR, (node.args[0], packed, bias), replacing=node, by="lower")
            reading.done([value])
            report.append(LayerChoice(layer, "bf16 packed", "kept in bfloat16", *value.shape))
    return report


def gelu_for_inductor(program: Program) -> None:
    for node in program.graph.find_nodes(op="call_function", target=_GELU):
        edit.call(program, ops.GELU, node.args, kwargs=node.kwargs, replacing=node, by="lower")
