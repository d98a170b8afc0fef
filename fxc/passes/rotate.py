"""The residual stream in other coordinates, in which no channel stands out: what is rounded afterwards loses less.

    constant @table.weight: f32[5, 2]
    constant @n.weight: f32[2]
    constant @head.weight: f32[3, 2]
    values @n.weight[:] = 2
    %0: i64[s0] = input "ids"
    %1: f32[s0, 2] = aten.embedding(@table.weight, %0)  # table
    %2: f32[s0, 2] = aten.rms_norm(%1, [2], @n.weight)  # n
    %3: f32[s0, 3] = aten.linear(%2, @head.weight)  # head
    return "out" %3
    ---
    constant @head.weight: f32[3, 2]
    constant @table.weight: f32[5, 2]
    %0: i64[s0] = input "ids"
    %1: f32[s0, 2] = aten.embedding(@table.weight, %0)  # table
    %2: f32[s0, 2] = aten.rms_norm(%1, [2])  # n (rotate)
    %3: f32[s0, 3] = aten.linear(%2, @head.weight)  # head
    return "out" %3
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxc.analysis.axes import analyse
from fxc.analysis.axis import Atom, resolve
from fxc.analysis.dims import Axes
from fxc.ir.call import Call
from fxc.ir.edit import call, constant, free_name, replace, sweep
from fxc.ir.names import layer_at
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Refusal, Result
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED
from fxc.passes.linears import GROUPED, LINEAR

aten = torch.ops.aten
SPARSE = 0.1
EMBEDDING = aten.embedding.default
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_NORMS = {aten.rms_norm.default, aten.layer_norm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
# They move numbers about, and one along another dimension does not touch the stream's own.
_MOVES = {
    aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.dropout.default, aten.view.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.repeat.default, aten.permute.default,
    aten.transpose.int, aten.flatten.using_ints, aten.slice.Tensor, aten.select.int, aten.index.Tensor,
    aten.index_select.default, aten.gather.default, aten.cat.default, aten.index_add.default, aten.sum.dim_IntList,
   
}  # fmt: skip


class _Stays(Exception):
    """Why a stream cannot be rotated."""


@dataclass
class _Stream:
    """What touches the axis `atom` of the residual stream.

    writers, readers: layers that write it and that read it, each reader with the gain on its way; gains: nodes that multiply
    by one; norms: those that are one operator; tables: calls that read constants as values of the stream, and which; labels: of
    each value its gain; normed: the values behind a norm.
    """

    axes: Axes
    atom: Atom
    writers: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    gains: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    labels: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    normed: set[fx.Node] = field(default_factory=set)
    tables: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def dims(self, node: object) -> list[int]:
        """The dimensions of a value that are the stream's."""
        found = self.axes.values.get(node, ()) if isinstance(node, fx.Node) else ()
        if any(isinstance(each, tuple) for each in found):
            if any(resolve(a) is self.atom for each in found for a in each):
                raise _Stays(f"{node} divides it")
            return []
        return [d for d, axis in enumerate(found) if resolve(axis) is self.atom]

    def trace(self) -> None:
        """Fill in what touches the axis. Raises `_Stays`."""
        for node in self.axes.program.graph.nodes:
            if node.op == "placeholder" and self.dims(node):
                raise _Stays(f"it is a dimension of the input {node}")
            if node.op == "output" and any(self.dims(each) for each in node.all_input_nodes):
                raise _Stays("the model returns it")
            if node.op == "call_function" and (self.dims(node) or any(map(self.dims, node.all_input_nodes))):
                self._touched(node)
        means = [node for node in self.norms if node.target is aten.layer_norm.default]
        if means and (bare := [reader for reader in self.readers if reader.args[0] not in self.normed]):
            raise _Stays(f"{bare[0]} reads it with its mean, which a layer norm elsewhere subtracts")

    def _touched(self, node: fx.Node) -> None:
        target = node.target
        # What gives its dtype alone is not read.
        inputs = node.all_input_nodes[:1] if target is aten.type_as.default else node.all_input_nodes
        given = [each for each in inputs if self.dims(each)]
        if target not in (EMBEDDING, LINEAR) and all(map(_is_fixed, inputs)):
            return
        elif target in (LINEAR, GROUPED, EMBEDDING):
            self._layer(node)
        elif target in _CONVOLUTIONS:
            self._convolution(node)
        elif target in _NORMS:
            self._norm(node)
        elif target is aten.pow.Tensor_Scalar and node.args[1] == 2 and all(self._averages(user) for user in node.users):
            self._plain(node, given)
        elif self._averages(node) and given[0].target is aten.pow.Tensor_Scalar:
            return
        elif target in _SUMS and len(node.args) >= 2 and all(self.dims(each) for each in node.args[:2]):
            self._plain(node, self._values(node, given))
        elif target is aten.mul.Tensor and len(given) == 2 and any(map(_is_fixed, given)):
            gain, value = sorted(given, key=_is_fixed, reverse=True)
            if len(gain.meta["val"].shape) != 1:
                raise _Stays(f"{node} multiplies it by a tensor")
            self._plain(node, [value])
            self.labels[node] = node
            self.gains.append(node)
            self._keep_normed(node, [value])
        elif self._scales(node, given) or (target in _MOVES and self._moves(node, given)):
            values = self._values(node, given)
            labels = {self.labels[each] for each in values} | ({None} if len(values) < len(given) else set())
            if len(labels) > 1:
                raise _Stays(f"{node} joins what is scaled in two ways")
            self.labels[node] = labels.pop()
            self._keep_normed(node, given)
        else:
            raise _Stays(f"{Call(node).name} ({layer_at(self.axes.program, node)}) is no linear map of it")

    def _values(self, node: fx.Node, given: list[fx.Node]) -> list[fx.Node]:
        """What of `given` is computed from the inputs; the others are tables, which write the stream too."""
        if fixed := [each for each in given if _is_fixed(each)]:
            self.tables[node] = fixed
        return [each for each in given if each not in fixed]

    def _convolution(self, node: fx.Node) -> None:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        for parameter in (weight, bias):
            if parameter is not None:
                self._is_constant(parameter, node)
        if self.dims(weight) != [0] or self.dims(node) != [1] or self.dims(node.args[0]):
            raise _Stays(f"the convolution {layer_at(self.axes.program, node)} reads it")
        self.writers.append(node)
        self.labels[node] = None

    def _keep_normed(self, node: fx.Node, given: list[fx.Node]) -> None:
        if all(each in self.normed for each in given):
            self.normed.add(node)

    def _averages(self, node: fx.Node) -> bool:
        """Whether `node` is the mean or sum over the stream's dimension, and over that alone."""
        if node.target not in (aten.mean.dim, aten.sum.dim_IntList):
            return False
        rank = len(node.args[0].meta["val"].shape)
        return [d % rank for d in node.args[1] or ()] == self.dims(node.args[0])

    def _scales(self, node: fx.Node, given: list[fx.Node]) -> bool:
        """Whether `node` multiplies the stream by what is the same for all its channels, or divides it by that."""
        return node.target in _SCALES and len(given) == 1 and (given[0] is node.args[0] or node.target not in _QUOTIENTS)

    def _moves(self, node: fx.Node, given: list[fx.Node]) -> bool:
        """Whether the stream's dimension comes out as it went in."""
        before, after = [self.dims(each) for each in given], self.dims(node)
        if len(after) != 1 or any(len(each) != 1 for each in before):
            return False
        call = Call(node)
        if node.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.index_add.default,
                           aten.gather.default, aten.cat.default):  # fmt: skip
            return call["dim"] % len(given[0].meta["val"].shape) != before[0][0]
        if node.target is aten.index.Tensor:
            return before[0][0] >= len(call["indices"]) or call["indices"][before[0][0]] is None
        return True

    def _plain(self, node: fx.Node, given: Iterable[fx.Node]) -> None:
        for each in given:
            if self.labels.get(each) is not None:
                raise _Stays(f"{node} takes in what is scaled by {self._gain(each)}, which a rotation does not pass")
        self.labels[node] = None

    def _gain(self, node: fx.Node) -> str:
        return layer_at(self.axes.program, self.labels[node])

    def _is_constant(self, node: object, by: fx.Node) -> None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise _Stays(f"{by} has a weight that is computed while the model runs")

    def _norm(self, node: fx.Node) -> None:
        call = Call(node)
        x = call["input"]
        rank = len(x.meta["val"].shape)
        if self.dims(x) != [rank - 1] or len(call["normalized_shape"]) != 1:
            raise _Stays(f"{node} normalises more than it")
        self._plain(node, [x])
        for parameter in (call["weight"], call.get("bias")):
            if parameter is not None:
                self._is_constant(parameter, node)
        self.norms.append(node)
        self.normed.add(node)
        self.labels[node] = node

    def _layer(self, node: fx.Node) -> None:
        weight = node.args[0] if node.target is EMBEDDING else node.args[1]
        self._is_constant(weight, node)
        dims, rank = self.dims(weight), len(weight.meta["val"].shape)
        x = node.args[1 if node.target is EMBEDDING else 0]
        bias = node.args[2] if node.target is LINEAR and len(node.args) > 2 else None
        reads = node.target is not EMBEDDING and self.dims(x) == [len(x.meta["val"].shape) - 1] and rank - 1 in dims
        writes = (rank - 1 if node.target is EMBEDDING else rank - 2) in dims
        if len(dims) != reads + writes or (self.dims(x) and not reads):
            raise _Stays(f"{node} reads it in parts")
        if bias is not None:
            self._is_constant(bias, node)
        if reads:
            self.readers[node] = self.labels[x]
        if writes:
            self.writers.append(node)
            self.labels[node] = None


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate the residual stream by a randomised Hadamard matrix (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406,
    without training): what writes it and what reads it turn together, so that nothing changes but which numbers are rounded.

    The gains of norms become a part of the layers that read them. Before layer norms the layers that write lose their mean,
    which the norms would subtract. A tied table is untied, which costs its bytes. A stream that something else than linear
    maps and norms touches, or that the model returns, stays as it is.
    seed: of the signs of the Hadamard matrix, and of the rotation that stands in where a width is no power of two; the seed of
    the compilation is added to it.
    """

    seed: int = 0

    name: ClassVar[str] = "rotate"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS, UNSCALED})
    rounds: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        before = program.nbytes()
        for stream in _streams(program):
            try:
                stream.trace()
                _check_dense(program, stream)
            except _Stays as why:
                result.refusals.append(Refusal(_called(stream), f"the stream of {stream.atom.size} channels stays: {why}"))
                continue
            matrix = rotation(stream.atom.size, self.seed + context.seed)
            _turn(program, stream, matrix.to("meta") if program.is_on_meta else matrix)
            result.changed += len(stream.writers) + len(stream.readers)
        sweep(program)
        if (more := program.nbytes() - before) > 0:
            result.notes.append(f"a table that is tied to a head is stored twice now: {more / 1e6:.2f} MB more")
        return result


def rotation(size: int, seed: int = 0) -> Tensor:
    """An orthogonal float64 [size, size]: D H, a Hadamard matrix with random signs. Where `size` is no power of two, H is the
    Kronecker product of a random rotation with the Hadamard matrix of the largest power of two that divides it."""
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(power)
    if size > power:
        other = torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)
        matrix = torch.kron(torch.linalg.qr(other).Q.contiguous(), matrix)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


def _streams(program: Program) -> list[_Stream]:
    """The axes that are normalised over, and that whole layers write and read."""
    axes = analyse(program)
    found: dict[Atom, None] = {}
    written, read = set(), set()
    for node in program.graph.nodes:
        if node.target is LINEAR and node.args[1].op == "get_attr":
            out, into = axes.of(node.args[1])
            written.add(out)
            read.add(into)
        elif node.target is EMBEDDING and node.args[0].op == "get_attr":
            written.add(axes.of(node.args[0])[-1])
    for node in program.graph.nodes:
        squares = node.target is aten.pow.Tensor_Scalar and any(user.target is aten.mean.dim for user in node.users)
        if (node.target in _NORMS or squares) and isinstance(axis := axes.of(node.args[0])[-1], Atom):
            found.setdefault(axis)
    return [_Stream(axes, atom) for atom in found if atom in written and atom in read]


def _called(stream: _Stream) -> str:
    """What writes the stream first."""
    program = stream.axes.program
    for node in program.graph.nodes:
        if node.target in (LINEAR, EMBEDDING) and resolve(stream.axes.values[node][-1]) is stream.atom:
            return layer_at(program, node)
    return "the model"


# Of the operators that write the stream, which arguments do, and along which dimension.
_WRITTEN = {EMBEDDING: {0: -1}, LINEAR: {1: -2, 2: -1}, GROUPED: {1: -2}}
_CONVOLVED = {1: 0, 2: 0}


def _check_dense(program: Program, stream: _Stream) -> None:
    """Raises `_Stays` where a layer has zeros that a rotation would fill, besides whole rows of them."""
    if program.is_on_meta:
        return
    read = [(layer.args[1], -1) for layer in stream.readers]
    first = {layer: next(iter(_WRITTEN.get(layer.target, _CONVOLVED).items())) for layer in stream.writers}
    for weight, dim in read + [(layer.args[at], dim) for layer, (at, dim) in first.items()]:
        rows = program.constants[weight.target].movedim(dim, -1) != 0
        rows = rows[rows.any(-1)]
        if len(rows) and rows.float().mean() < 1 - SPARSE:
            share = f"{1 - rows.float().mean():.0%} of {weight.target}"
            raise _Stays(f"{share} are zeros, which would be filled: rotate before they are made")


def _turn(program: Program, stream: _Stream, matrix: Tensor) -> None:
    centred = any(node.target is aten.layer_norm.default for node in stream.norms)

    def turned(tensor: Tensor, dim: int) -> Tensor:
        rows = tensor.double().movedim(dim, -1)
        rows = rows - rows.mean(-1, keepdim=True) if centred else rows
        return (rows @ matrix).movedim(-1, dim)

    for node in stream.writers:
        for at, dim in _WRITTEN.get(node.target, _CONVOLVED).items():
            if at < len(node.args) and node.args[at] is not None:
                _give(program, node, at, turned(program.constants[node.args[at].target], dim))
    for node, tables in stream.tables.items():
        for table in tables:
            value = _value(program, table)
            values = turned(value, stream.dims(table)[0]).to(value.dtype).contiguous()
            name = table.target if table.op == "get_attr" else f"{node.meta.get('fqn') or node.name}.table"
            node.replace_input_with(table, constant(program, free_name(program, f"{name}_rotated"), values, node))
    for node, gain in stream.readers.items():
        _read(program, node, gain, matrix)
    for node in stream.gains:
        value = next(each for each in node.all_input_nodes if each in stream.labels)
        if value.meta["val"].dtype == node.meta["val"].dtype:
            replace(node, value)
        else:
            call(program, aten.to.dtype, (value, node.meta["val"].dtype), replacing=node, by=Rotate.name)
    for node in stream.norms:
        given = Call(node)
        eps = given["eps"]
        if node.target is aten.rms_norm.default and given["weight"] is None:
            continue
        args = (given["input"], given["normalized_shape"], None, eps) if eps is not None else given.node.args[:2]
        call(program, aten.rms_norm.default, args, replacing=node, by=Rotate.name)


def _read(program: Program, node: fx.Node, gain: fx.Node | None, matrix: Tensor) -> None:
    weight = program.constants[node.args[1].target].double()
    if gain is not None:
        scale, shift = _affine(program, gain)
        if shift is not None:
            bias = weight @ shift
            if len(node.args) > 2 and node.args[2] is not None:
                bias = bias + program.constants[node.args[2].target].double()
            _give(program, node, 2, bias)
        weight = weight if scale is None else weight * scale
    _give(program, node, 1, weight @ matrix)


def _affine(program: Program, gain: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """What `gain` multiplies by and adds, float64 [C]."""
    if gain.target in _NORMS:
        given = Call(gain)
        named = (given["weight"], given.get("bias"))
    else:
        named = (next(each for each in gain.all_input_nodes if _is_fixed(each)), None)
    return tuple(None if each is None else _value(program, each).double() for each in named)


def _is_fixed(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_fixed, node.all_input_nodes)))


def _value(program: Program, node: fx.Node) -> Tensor:
    """What a node is that is computed from constants alone."""
    if node.op == "get_attr":
        return program.constants[node.target]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: _value(program, each))
    return node.target(*args, **kwargs)


def _give(program: Program, node: fx.Node, at: int, tensor: Tensor) -> None:
    """Let `node` read `tensor` as its argument `at`, under the name of what it read there unless others read that too."""
    args = list(node.args) + [None] * (at + 1 - len(node.args))
    old = args[at]
    dtype = program.constants[node.args[0 if node.target is EMBEDDING else 1].target].dtype
    tensor = tensor.to(program.constants[old.target].dtype if old is not None else dtype).contiguous()
    if old is not None and users_of(program, old.target) == [node]:
        program.constants[old.target] = tensor
        return
    base = layer_at(program, node) if old is None else node.meta.get("fqn") or old.target.rpartition(".")[0]
    name = "bias" if at == 2 else "weight"
    args[at] = constant(program, free_name(program, f"{base}.{name}"), tensor, node)
    node.args = tuple(args)
