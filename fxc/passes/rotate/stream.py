"""What touches an axis of a program, and whether its channels can be turned: multiplied by an orthogonal matrix where they are
written, and by the same one where they are read.

Linear maps along the axis take the matrix in. What adds, moves or scales channels alike goes through it, and so do root mean
squares, products of two turned values and, along their width, the values of attention. A gain of each channel is passed on to
the layers that read it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import fx

from fxc.analysis.axis import Atom, Axis, Product, Sum, atoms, resolve
from fxc.analysis.dims import Axes
from fxc.ir.cache import as_past, cache_pairs
from fxc.ir.call import Call
from fxc.ir.names import layer_at
from fxc.passes.linears import GROUPED, LINEAR

aten = torch.ops.aten
EMBEDDING = aten.embedding.default
ATTENTION = aten.scaled_dot_product_attention.default
NORMS = {aten.rms_norm.default, aten.layer_norm.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
# They move numbers about, and one along another dimension does not touch the stream's own.
_CUTS = {aten.slice.Tensor, aten.cat.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_ALONG = {
    aten.select.int, aten.unbind.int, aten.index_select.default, aten.gather.default, aten.index_add.default,
    aten.repeat_interleave.self_int,
}  # fmt: skip
_MOVES = _CUTS | _ALONG | {
    aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.dropout.default, aten.view.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.repeat.default, aten.permute.default,
    aten.transpose.int, aten.flatten.using_ints, aten.unflatten.int, aten.index.Tensor, aten.sum.dim_IntList, operator.getitem,
}  # fmt: skip


class Stays(Exception):
    """Why a stream cannot be turned."""


@dataclass
class Stream:
    """What touches the axis `atom`, all of a dimension or what varies fastest in it, as the width of heads does.

    nodes: all that have it or read what has it, in order; writers, readers: layers that write it and that read it, each reader
    with the gain on its way; gains: nodes that multiply by one; norms: those that are one operator; tables: calls that read
    constants as values of the stream, and which; cached: names of cache inputs that hold it; labels: of each value its gain;
    normed: the values behind a norm.
    """

    axes: Axes
    atom: Atom
    nodes: list[fx.Node]
    writers: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    gains: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    tables: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    labels: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    normed: set[fx.Node] = field(default_factory=set)

    @property
    def is_centred(self) -> bool:
        return any(node.target is aten.layer_norm.default for node in self.norms)

    def named(self) -> str:
        """What writes the stream first."""
        for node in self.nodes:
            if node.target in (LINEAR, EMBEDDING) and self.atom in atoms(self.axes.values[node][-1]):
                return layer_at(self.axes.program, node)
        return "the model"

    def blocks(self, axis: Axis) -> list[tuple[int, int]]:
        """From where to where along an axis the channels of the stream come, once or again and again. Raises `Stays`."""
        found, begin = [], 0
        for term in _terms(axis):
            if self.atom in atoms(term):
                *others, last = term.factors if isinstance(term, Product) else [term]
                if last is not self.atom or any(self.atom in atoms(each) for each in others):
                    raise Stays("its channels are divided")
                found.append((begin, begin + term.size))
            begin += term.size
        return found

    def dims(self, node: object) -> list[int]:
        """The dimensions of a value, or of one of several, that are the stream's."""
        found = self.axes.values.get(node, ()) if isinstance(node, fx.Node) else ()
        parts = [part for part in found if isinstance(part, tuple)] or [found]
        return sorted({d for part in parts for d, axis in enumerate(part) if self.blocks(axis)})

    def trace(self) -> None:
        """Fill in what touches the axis. Raises `Stays`."""
        pairs = cache_pairs(self.axes.program)
        for node in self.nodes:
            if node.op == "placeholder":
                name = self.axes.program.signature.inputs[self.axes.program.placeholders.index(node)].name
                if name not in pairs or not self._is_whole(node):
                    raise Stays(f"it is a dimension of the input {node}")
                self.cached.append(name)
                self.labels[node] = None
            elif node.op == "output":
                self._returned()
            elif node.op == "call_function":
                self._touched(node)
        if self.is_centred and self.cached:
            raise Stays("a layer norm subtracts its mean, and the cache holds it")
        if self.is_centred and (bare := [reader for reader in self.readers if reader.args[0] not in self.normed]):
            raise Stays(f"{bare[0]} reads it with its mean, which a layer norm elsewhere subtracts")

    def _returned(self) -> None:
        program = self.axes.program
        for name, node in zip(program.signature.outputs, program.results, strict=True):
            if not self.dims(node):
                continue
            if as_past(name) not in self.cached or not self._is_whole(node):
                raise Stays("the model returns it")
            self._plain(node, [node])

    def _touched(self, node: fx.Node) -> None:
        target = node.target
        # What gives its dtype alone is not read.
        inputs = node.all_input_nodes[:1] if target is aten.type_as.default else node.all_input_nodes
        given = [each for each in inputs if self.dims(each)]
        if target not in (EMBEDDING, LINEAR) and all(map(is_fixed, inputs)):
            return
        elif target in (LINEAR, GROUPED, EMBEDDING):
            self._layer(node)
        elif target in _CONVOLUTIONS:
            self._convolution(node)
        elif target in NORMS:
            self._norm(node)
        elif target is ATTENTION:
            self._attention(node)
        elif target in PRODUCTS:
            self._product(node)
        elif target is aten.pow.Tensor_Scalar and node.args[1] == 2 and all(self._averages(user) for user in node.users):
            self._plain(node, given)
        elif self._averages(node) and given[0].target is aten.pow.Tensor_Scalar:
            return
        elif target in _SUMS and len(node.args) >= 2 and all(self.dims(each) for each in node.args[:2]):
            self._plain(node, self._values(node, given))
        elif target is aten.mul.Tensor and len(given) == 2 and any(map(is_fixed, given)):
            gain, value = sorted(given, key=is_fixed, reverse=True)
            if len(gain.meta["val"].shape) != 1:
                raise Stays(f"{node} multiplies it by a tensor")
            self._plain(node, [value])
            self.labels[node] = node
            self.gains.append(node)
            self._keep_normed(node, [value])
        elif self._scales(node, given) or (target in _MOVES and self._moves(node, given)):
            self._joins(node, given)
        else:
            raise Stays(f"{Call(node).name} ({layer_at(self.axes.program, node)}) is no linear map of it")

    def _joins(self, node: fx.Node, given: list[fx.Node]) -> None:
        values = self._values(node, given)
        labels = {self.labels[each] for each in values} | ({None} if len(values) < len(given) else set())
        if len(labels) > 1:
            raise Stays(f"{node} joins what is scaled in two ways")
        self.labels[node] = labels.pop()
        self._keep_normed(node, given)

    def _values(self, node: fx.Node, given: list[fx.Node]) -> list[fx.Node]:
        """What of `given` is computed from the inputs; the others are tables, which write the stream too."""
        if fixed := [each for each in given if is_fixed(each)]:
            self.tables[node] = fixed
        return [each for each in given if each not in fixed]

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether the last dimension of a value is the stream's axis and nothing else is."""
        *others, last = self.axes.of(node)
        return last is self.atom and not any(self.blocks(axis) for axis in others)

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
        if any(len(each) != 1 for each in before):
            return False
        [dim], call = before[0], Call(node)
        if node.target is operator.getitem:
            return len(after) <= 1
        if node.target in _CUTS and call["dim"] % len(given[0].meta["val"].shape) == dim:
            return self._cut_between(node, dim)
        if node.target in _ALONG and (call["dim"] is None or call["dim"] % len(given[0].meta["val"].shape) == dim):
            return False
        if node.target is aten.index.Tensor and dim < len(call["indices"]) and call["indices"][dim] is not None:
            return False
        return len(after) == 1

    def _cut_between(self, node: fx.Node, dim: int) -> bool:
        """Whether a cut or a concatenation along the stream's own dimension leaves each part of it whole."""

        def lined(values: Iterable[tuple[Axis, ...]]) -> list[Axis]:
            return list(chain.from_iterable(_terms(axes[dim]) for axes in values))

        values = self.axes.values
        if node.target is aten.cat.default:
            return lined(values[each] for each in node.args[0]) == lined([values[node]])
        whole = lined([values[node.args[0]]])
        if node.target is not aten.slice.Tensor:
            return lined(values[node]) == whole
        part = lined([values[node]])
        return any(whole[at : at + len(part)] == part for at in range(len(whole)))

    def _plain(self, node: fx.Node, given: Iterable[fx.Node]) -> None:
        for each in given:
            if self.labels.get(each) is not None:
                gain = layer_at(self.axes.program, self.labels[each])
                raise Stays(f"{node} takes in what is scaled by {gain}, which a rotation does not pass")
        self.labels[node] = None

    def _is_constant(self, node: object, by: fx.Node) -> None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise Stays(f"{by} has a weight that is computed while the model runs")

    def _attention(self, node: fx.Node) -> None:
        """Its values pass; queries and keys may be turned together."""
        call = Call(node)
        its = {name: call[name] for name in ("query", "key", "value", "attn_mask") if self.dims(call[name])}
        if any(self.dims(each) != [len(each.meta["val"].shape) - 1] for each in its.values()):
            raise Stays(f"{node} attends along it")
        if "attn_mask" in its or ("query" in its) != ("key" in its):
            raise Stays(f"{node} compares it with something else")
        self._plain(node, [its[name] for name in ("query", "key") if name in its])
        if "value" in its:
            self.labels[node] = self.labels[its["value"]]

    def _product(self, node: fx.Node) -> None:
        """A product along the stream of two values that have it, or along another dimension."""
        dims = [self.dims(each) for each in node.args[:2]]
        ranks = [len(each.meta["val"].shape) for each in node.args[:2]]
        if dims == [[ranks[0] - 1], [ranks[1] - 2]]:
            self._plain(node, node.args[:2])
        elif dims in ([[], [ranks[1] - 1]], [[ranks[0] - 2], []]):
            self._joins(node, [each for each, its in zip(node.args, dims, strict=True) if its])
        else:
            raise Stays(f"{node} multiplies it by something else")

    def _convolution(self, node: fx.Node) -> None:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        for parameter in (weight, bias):
            if parameter is not None:
                self._is_constant(parameter, node)
        if self.dims(weight) != [0] or self.dims(node) != [1] or self.dims(node.args[0]):
            raise Stays(f"the convolution {layer_at(self.axes.program, node)} reads it")
        self.writers.append(node)
        self.labels[node] = None

    def _norm(self, node: fx.Node) -> None:
        call = Call(node)
        x = call["input"]
        if not self._is_whole(x) or len(call["normalized_shape"]) != 1:
            raise Stays(f"{node} normalises more than it")
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
            raise Stays(f"{node} reads it in parts")
        if bias is not None:
            self._is_constant(bias, node)
        if reads:
            self.readers[node] = self.labels[x]
        if writes:
            self.writers.append(node)
            self.labels[node] = None


def _terms(axis: Axis) -> list[Axis]:
    axis = resolve(axis)
    return list(axis.terms) if isinstance(axis, Sum) else [axis]


def is_fixed(node: fx.Node) -> bool:
    """Whether it is computed of constants alone."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(is_fixed, node.all_input_nodes)))
