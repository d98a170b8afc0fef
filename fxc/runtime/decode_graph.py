"""The program of one decode step over buffers of a fixed size, made from a lowered causal language model.

A captured decoder appends: keys = cat([past, new]), and reads its place in the sequence from the size of `past`. On
buffers, `past` has as many slots as the buffer, used or not, and the place is a number on the device:

    %past: [batch, heads, past, width]                        %past: [batch, heads, slots, width]
    %keys = cat([%past, %new], -2)                      ->    %keys = index_copy_(%past, 2, %slot, %new)
    %query = arange(new) + sym_size(%past, 2)           ->    %query = arange(new) + %slot
    %columns = arange(sym_size(%past, 2) + new)         ->    %columns = arange(sym_size(%past, 2))

Slot i holds column i of the sequence, so that causal masks and sliding windows, which compare the two aranges, stay what
they were. Slots after the current one are hidden by both, and by an attention mask that is 0 there. Any other use of the
size of `past` is refused.

What costs much where little is computed goes too. Keys and values that are repeated for groups of query heads are not: with
one query a row the queries of a group become the rows of one attention. A mask of booleans becomes numbers once, not in each
attention.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from fxc.errors import UsageError
from fxc.ir import edit
from fxc.ir.cache import as_past, is_past
from fxc.ir.check import check
from fxc.ir.infer import new_symbols
from fxc.ir.program import Input, Program, Signature
from fxc.lower.fusion import repeated_heads

_aten = torch.ops.aten
_SIZE = _aten.sym_size.int
_CAT = _aten.cat.default
_ADD = _aten.add.Tensor
_SLICE = _aten.slice.Tensor
_ATTENTION = _aten.scaled_dot_product_attention.default
_ARANGE = (_aten.arange.default, _aten.arange.start)
# Where the number of columns may stand: it then only says how large something is.
_SHAPES = (_aten.expand.default, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
# What takes indices of a dimension, its second argument, by a rule of its own.
_PARTS = (_SLICE, _aten.select.int, _aten.narrow.default, _aten.flip.default)
_END = 2**63 - 1
# Batch and slots of the example that types are inferred with.
_EXAMPLE = (2, 16)


def decode_program(lowered: Program) -> Program:
    """A program (input_ids [B, 1], attention_mask [B, S], position_ids [B, 1], slot int64 [1], buffers [B, heads, S, width] in
    place of the cache inputs) -> logits [B, 1, vocabulary]. It writes the new keys and values into the slot `slot` of the
    buffers, and shares the constants of `lowered`, which is not changed.

    Raises `UsageError` where the program's use of its cache is not the one above.
    """
    program = lowered.copy()
    graph, signature = program.graph, program.signature
    names = dict(zip(program.placeholders, (i.name for i in signature.inputs), strict=True))
    past = [node for node, name in names.items() if is_past(name)]
    if not past:
        raise _refusal("it has no cache", None)
    with graph.inserting_before(past[0]):
        slot = graph.placeholder("slot")
    _check_no_part_is_taken(graph, names)
    _write_in_place(graph, past, slot)
    _check_results(graph, names, signature)
    _take_place_from(slot, _sizes(graph, names), past)
    logits = graph.output_node().args[0][signature.outputs.index("logits")]
    graph.output_node().args = ((logits,),)
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        _attend_by_group(graph, node)
    _add_masks(graph)
    given = [Input("slot" if node is slot else names[node]) for node in program.placeholders]
    program.signature = Signature(given, ["logits"], {"args": list(range(len(given))), "kwargs": {}}, 0)
    program.metadata = {"class": "DecodeStep", "kind": "decode_step"}
    edit.sweep(program)
    _retype(program)
    check(program, lowered=True)
    return program


def _retype(program: Program) -> None:
    """Give every value the type that it has for one new token and buffers of any size."""
    mode, (batch, slots) = new_symbols(list(_EXAMPLE))
    types = []
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        before = node.meta.get("val")
        if before is None:
            shape, dtype = [1], torch.int64
        else:
            shape, dtype = [batch if isinstance(before.shape[0], torch.SymInt) else before.shape[0], 1], before.dtype
            if is_past(declared.name):
                shape = [shape[0], before.shape[1], slots, before.shape[3]]
            elif declared.name == "attention_mask":
                shape = [shape[0], slots]
        with mode:
            types.append(torch.empty(shape, dtype=dtype, device="cpu"))
    edit.retype(program, mode, types)


def _refusal(what: str, node: fx.Node | None) -> UsageError:
    return UsageError(
        f"this model cannot decode over a static cache: {what}",
        where=None if node is None else (node.meta.get("fqn") or node.format_node() or str(node)),
        hint="use it without static_cache",
    )


def _write_in_place(graph: fx.Graph, past: list[fx.Node], slot: fx.Node) -> None:
    """Let each cat of a cache input and what is new write into the input instead."""
    for node in past:
        appends = [user for user in node.users if user.target is not _SIZE]
        if len(appends) != 1 or not _appends(appends[0], node):
            raise _refusal("it does more with its cache than append to it", next(iter(appends), node))
        (append,) = appends
        with graph.inserting_before(append):
            written = graph.call_function(_aten.index_copy_.default, (node, 2, slot, append.args[0][1]))
        written.meta = {key: value for key, value in append.meta.items() if key != "val"} | {"dtype": node.meta["val"].dtype}
        append.replace_all_uses_with(written)
        graph.erase_node(append)


def _check_results(graph: fx.Graph, names: dict[fx.Node, str], signature: Signature) -> None:
    """Refuse unless each result but the logits is one of the cache inputs, written to."""
    for name, node in zip(signature.outputs, graph.output_node().args[0], strict=True):
        if name == "logits":
            continue
        if node.target is _aten.to.dtype and node.args[1] == node.args[0].meta.get("dtype"):
            node = node.args[0]
        writes = node.target is _aten.index_copy_.default and names[node.args[0]] == as_past(name)
        if not writes:
            raise _refusal(f"its result {name} is not its cache with the new entries", node)


def _check_no_part_is_taken(graph: fx.Graph, names: dict[fx.Node, str]) -> None:
    """Refuse what takes some columns of the cache or of the mask by their distance from the end: buffers end elsewhere."""
    sizes = [node.meta["val"].shape[2] for node, name in names.items() if is_past(name)]
    sizes += [node.meta["val"].shape[1] for node, name in names.items() if name == "attention_mask"]
    symbols = {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    columns = {_text(user.meta["val"].shape[2]) for node in names for user in node.users if _appends(user, node)}
    for node in graph.nodes:
        if node.target not in _PARTS or (node.target is _SLICE and tuple(node.args[2:]) in ((), (0,), (0, _END))):
            continue
        value = node.args[0].meta.get("val")
        dims = node.args[1] if len(node.args) > 1 else 0
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if value is not None and not _is_of(value.shape[dim], symbols):
                continue
            # All columns, of a value with some more at its end.
            if node.target is _SLICE and node.args[2] == 0 and _text(node.meta["val"].shape[dim]) in columns:
                continue
            raise _refusal("it takes a part of what it has cached", node)


def _text(size: object) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _is_of(size: object, symbols: set) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols & symbols)


def _appends(node: fx.Node, past: fx.Node) -> bool:
    if node.target is not _CAT or len(node.args) != 2 or node.args[1] not in (-2, 2):
        return False
    parts = node.args[0]
    return len(parts) == 2 and parts[0] is past and parts[1] is not past


def _sizes(graph: fx.Graph, names: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """What each number in the graph is that depends on how much is in the cache: "past", or "columns": past and new."""
    found: dict[fx.Node, str] = {}
    new: set[fx.Node] = set()
    for node in graph.find_nodes(op="call_function", target=_SIZE):
        tensor, dim = node.args
        name = names.get(tensor, "")
        if is_past(name) and dim == 2:
            found[node] = "past"
        elif (name == "attention_mask" and dim == 1) or (tensor.target is _aten.index_copy_.default and dim in (2, -2)):
            found[node] = "columns"
        elif name in ("input_ids", "position_ids") and dim == 1:
            new.add(node)
        elif tensor not in names:
            raise _refusal("it reads the size of a value that it computed", node)
    for node in list(graph.nodes):
        parts = [found.get(a) for a in node.args if isinstance(a, fx.Node)]
        if node.target is operator.add and "past" in parts:
            other = node.args[1] if found.get(node.args[0]) == "past" else node.args[0]
            if other not in new and other != 1:
                raise _refusal("it computes with the number of cached tokens", node)
            found[node] = "columns"
    return found


def _take_place_from(slot: fx.Node, sizes: dict[fx.Node, str], past: list[fx.Node]) -> None:
    """Replace what was read from the size of the cache: places by `slot`, the number of columns by the number of slots."""
    graph = slot.graph
    with graph.inserting_after(past[-1]):
        slots = graph.call_function(_SIZE, (past[0], 2))
    for size, kind in sizes.items():
        for user in list(size.users):
            if sizes.get(user) == "columns":
                continue
            first, second = (*user.args, None, None)[:2]
            adds = user.target is _ADD and isinstance(first, fx.Node) and first.target in _ARANGE
            counts = user.target is _aten.arange.start and first is size and sizes.get(second) == "columns"
            if kind == "past" and adds:
                user.replace_input_with(size, slot)
            elif kind == "past" and counts:
                user.replace_all_uses_with(slot)
            elif kind == "columns" and (user.target in _SHAPES or user.target is _aten.arange.default):
                user.replace_input_with(size, slots)
            elif user.users or user.op == "output":
                raise _refusal("it uses the number of cached tokens in a way that is not known here", user)


def _attend_by_group(graph: fx.Graph, node: fx.Node) -> None:
    """attention(q [B, H, 1, D], k and v repeated to [B, H, S, D]) -> attention(q as [B, KV, H / KV, D], k and v as they are),
    where its mask is the same for every head. Left as it is otherwise."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args)) | node.kwargs
    mask = arguments.get("attn_mask")
    repeated = [repeated_heads(arguments[name]) for name in ("key", "value")]
    is_plain = not arguments.get("is_causal") and not arguments.get("enable_gqa")
    if not is_plain or None in repeated or repeated[0][1:] != repeated[1][1:]:
        return
    if mask is not None and (mask.meta.get("val") is None or mask.meta["val"].dim() != 4 or mask.meta["val"].shape[1] != 1):
        return
    (key, heads, group, width), (value, *_) = repeated
    with graph.inserting_before(node):
        query = graph.call_function(_aten.reshape.default, (arguments["query"], [-1, heads, group, width]))
    node.args = (query, key, value, *node.args[3:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("query", "key", "value")}
    with graph.inserting_after(node):
        back = graph.call_function(_aten.reshape.default, (node, [-1, heads * group, 1, width]))
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _add_masks(graph: fx.Graph) -> None:
    """Give attentions, in place of a mask of booleans, the numbers that they would make of it: 0 and -inf."""
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        value = node.meta.get("val")
        if mask is None or value is None or mask.meta.get("val") is None or mask.meta["val"].dtype != torch.bool:
            continue
        if (mask, value.dtype) not in made:
            with graph.inserting_after(mask):
                numbers = graph.call_function(_aten.where.Scalar, (mask, 0.0, -math.inf))
            with graph.inserting_after(numbers):
                made[mask, value.dtype] = graph.call_function(_aten.to.dtype, (numbers, value.dtype))
        node.replace_input_with(mask, made[mask, value.dtype])
