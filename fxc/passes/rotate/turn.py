"""Turning a stream: new constants for what writes it and what reads it, gains gone into the readers, norms without them."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor, fx

from fxc.analysis.axis import Axis
from fxc.ir.call import Call
from fxc.ir.edit import call, constant, free_name, replace
from fxc.ir.names import layer_at
from fxc.ir.program import Program, users_of
from fxc.passes.rotate.stream import EMBEDDING, GROUPED, LINEAR, NORMS, Stays, Stream, is_fixed

aten = torch.ops.aten
BY = "rotate"
SPARSE = 0.1
# Of the operators that write a stream, which arguments do, and along which dimension.
_WRITTEN = {EMBEDDING: {0: -1}, LINEAR: {1: -2, 2: -1}, GROUPED: {1: -2}}
_CONVOLVED = {1: 0, 2: 0}


def check_dense(program: Program, stream: Stream) -> None:
    """Raises `Stays` where a layer has zeros that a rotation would fill, besides whole rows of them."""
    if program.is_on_meta:
        return
    read = [(layer.args[1], -1) for layer in stream.readers]
    first = {layer: next(iter(_written(layer).items())) for layer in stream.writers}
    for weight, dim in read + [(layer.args[at], dim) for layer, (at, dim) in first.items()]:
        rows = program.constants[weight.target].movedim(dim, -1) != 0
        for begin, end in stream.blocks(stream.axes.of(weight)[dim]):
            part = rows[..., begin:end].unflatten(-1, (-1, stream.atom.size))
            part = part[part.any(-1)]
            if len(part) and part.float().mean() < 1 - SPARSE:
                share = f"{1 - part.float().mean():.0%} of {weight.target}"
                raise Stays(f"{share} are zeros, which would be filled: rotate before they are made")


def turn(program: Program, stream: Stream, matrix: Tensor) -> Counter[str]:
    """Multiply the channels of `stream` by `matrix`, float64 [C, C], wherever they are written and read. Returns the bytes of
    the copies that were needed, by the constant that others read too."""
    copies: Counter[str] = Counter()
    # Readers first: a head that is tied to a table leaves it under its name.
    read: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node, gain in stream.readers.items():
        parameters = () if gain is None else _parameters(gain)
        names = (each.target if each is not None and each.op == "get_attr" else each for each in (*node.args[1:3], *parameters))
        read[len(node.args), *names].append(node)
    for nodes in read.values():
        _read(program, stream, nodes, matrix, copies)
    written: dict[tuple[str, int, int], list[fx.Node]] = defaultdict(list)
    for node in stream.writers:
        for at, dim in _written(node).items():
            if at < len(node.args) and node.args[at] is not None:
                written[node.args[at].target, at, dim].append(node)
    for (name, at, dim), nodes in written.items():
        axis = stream.axes.of(nodes[0])[1 if _written(nodes[0]) is _CONVOLVED else -1]
        _give(program, nodes, at, _turned(stream, program.constants[name], axis, dim, matrix, stream.is_centred), copies)
    for node, tables in stream.tables.items():
        for table in tables:
            value, [dim] = _value(program, table), stream.dims(table)
            axis = stream.axes.of(table)[dim]
            values = _turned(stream, value, axis, dim, matrix, stream.is_centred).to(value.dtype).contiguous()
            name = table.target if table.op == "get_attr" else f"{node.meta.get('fqn') or node.name}.table"
            node.replace_input_with(table, constant(program, free_name(program, f"{name}_rotated"), values, node))
    _drop_gains(program, stream)
    return copies


def _written(node: fx.Node) -> dict[int, int]:
    return _WRITTEN.get(node.target, _CONVOLVED)


def _turned(stream: Stream, tensor: Tensor, axis: Axis, dim: int, matrix: Tensor, centred: bool = False) -> Tensor:
    """`tensor`, whose dimension `dim` is `axis`, with the channels of the stream turned, float64."""
    rows = tensor.double().movedim(dim, -1).clone()
    for begin, end in stream.blocks(axis):
        part = rows[..., begin:end].unflatten(-1, (-1, stream.atom.size))
        part = part - part.mean(-1, keepdim=True) if centred else part
        rows[..., begin:end] = (part @ matrix).flatten(-2)
    return rows.movedim(-1, dim)


def _read(program: Program, stream: Stream, nodes: list[fx.Node], matrix: Tensor, copies: Counter[str]) -> None:
    """Let `nodes`, which read the stream by the same weight behind the same gain, read it turned."""
    node, axis = nodes[0], stream.axes.of(nodes[0].args[0])[-1]
    weight = program.constants[node.args[1].target].double()
    if (gain := stream.readers[node]) is not None:
        scale, shift = (None if each is None else _value(program, each).double() for each in _parameters(gain))
        if shift is not None:
            bias = weight @ shift
            if len(node.args) > 2 and node.args[2] is not None:
                bias = bias + program.constants[node.args[2].target].double()
            _give(program, nodes, 2, bias, copies)
        weight = weight if scale is None else weight * scale
    _give(program, nodes, 1, _turned(stream, weight, axis, -1, matrix), copies)


def _drop_gains(program: Program, stream: Stream) -> None:
    for node in stream.gains:
        value = next(each for each in node.all_input_nodes if each in stream.labels)
        if value.meta["val"].dtype == node.meta["val"].dtype:
            replace(node, value)
        else:
            call(program, aten.to.dtype, (value, node.meta["val"].dtype), replacing=node, by=BY)
    for node in stream.norms:
        given = Call(node)
        eps = given["eps"]
        if node.target is aten.rms_norm.default and given["weight"] is None:
            continue
        args = (given["input"], given["normalized_shape"], None, eps) if eps is not None else given.node.args[:2]
        call(program, aten.rms_norm.default, args, replacing=node, by=BY)


def _parameters(gain: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What `gain` multiplies by and what it adds, [C] each."""
    if gain.target in NORMS:
        given = Call(gain)
        return given["weight"], given.get("bias")
    return next(each for each in gain.all_input_nodes if is_fixed(each)), None


def _value(program: Program, node: fx.Node) -> Tensor:
    """What a node is that is computed from constants alone."""
    if node.op == "get_attr":
        return program.constants[node.target]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: _value(program, each))
    return node.target(*args, **kwargs)


def _give(program: Program, nodes: list[fx.Node], at: int, tensor: Tensor, copies: Counter[str]) -> None:
    """Let `nodes`, which read one constant or none as their argument `at`, read `tensor` there. It has the constant's name,
    unless others read that too; then `copies` counts its bytes."""
    first = nodes[0]
    old = first.args[at] if at < len(first.args) else None
    dtype = program.constants[first.args[0 if first.target is EMBEDDING else 1].target].dtype
    tensor = tensor.to(program.constants[old.target].dtype if old is not None else dtype).contiguous()
    if old is not None and set(users_of(program, old.target)) == set(nodes):
        program.constants[old.target] = tensor
        return
    base = layer_at(program, first) if old is None else first.meta.get("fqn") or old.target.rpartition(".")[0]
    name = f"{base}.{'bias' if at == 2 else 'weight'}"
    if old is not None and program.aliases.get(name) == old.target:
        del program.aliases[name]  # it is no longer the same
    made = constant(program, free_name(program, name), tensor, first)
    for node in nodes:
        args = list(node.args) + [None] * (at + 1 - len(node.args))
        args[at] = made
        node.args = tuple(args)
    if old is not None:
        copies[old.target] += tensor.numel() * tensor.element_size()
