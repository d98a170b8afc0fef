"""Sparse constant propagation: the parts of values that are the same number whatever the program is given.

A zero row of a weight makes its output equal to the bias, at every position and for every input; through an activation f that
is f(bias), through a product with zero it is zero. What is known of a value is kept compactly: a dimension along which it does
not vary, as every dynamic one, has size 1. Products with zero are zero: a program whose values overflow to infinity is outside
of this analysis.

The keys and values that a decoder's cache hands to the next call are what this one returned, so that the past is known where
the present is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.analysis.axes import cache_pairs
from fxc.analysis.shapes import regroup
from fxc.ir.program import Program
from fxc.schemes import ops

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Known:
    """values, mask: of one shape, in which each size is that of the value's dimension or 1; mask: where `values` hold."""

    values: Tensor
    mask: Tensor

    @property
    def is_complete(self) -> bool:
        # An expanded mask is read once along what it is expanded along.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.mask.stride())
        return bool(self.mask[once].all())

    def zeros(self) -> Tensor:
        """Where the value is known to be zero."""
        return self.mask & (self.values == 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        """The same rearrangement of both."""
        return Known(function(self.values), function(self.mask))


def known_values(program: Program) -> dict[fx.Node, Known]:
    """What is known of each value; a node of whose value nothing is known is left out."""
    found: dict[fx.Node, Any] = {}
    state = _State(program, found)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                tensor = program.constants[node.target]
                if not tensor.is_meta and not tensor.is_complex():
                    found[node] = Known(tensor, torch.ones((1,) * tensor.ndim, dtype=torch.bool).expand(tensor.shape))
            elif node.op == "call_function":
                result = _of(state, node)
                if isinstance(result, list) or (result is not None and bool(result.mask.any())):
                    found[node] = result
    return {node: k for node, k in found.items() if isinstance(k, Known)}


@dataclass
class _State:
    program: Program
    found: dict[fx.Node, Any]

    def __post_init__(self) -> None:
        pairs = cache_pairs(self.program).values()
        inputs, outputs = self.program.placeholders, self.program.results
        self.past = {inputs[i]: outputs[o] for i, o in pairs}

    def get(self, argument: Any) -> Known | None:
        return self.found.get(argument) if isinstance(argument, fx.Node) else None


def _of(state: _State, node: fx.Node) -> Any:
    rule, tags = _RULES.get(node.target), node.target.tags if isinstance(node.target, OpOverload) else ()
    if rule is None and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        rule = _pointwise if len(node.target._schema.returns) == 1 else None
    return None if rule is None else rule(state, node)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _compact(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else 1 for s in shape)


def _widened(known: Known, dim: int, size: int) -> Known:
    """With dimension `dim` written out to `size`."""
    if known.values.shape[dim] == size:
        return known
    sizes = [-1] * known.values.ndim
    sizes[dim] = size
    return known.map(lambda t: t.expand(sizes))


def _uniform(known: Known, dims: list[int]) -> Known:
    """With size 1 along `dims`, known where all along them are and agree."""
    values, mask = known.values, known.mask
    for d in dims:
        first = values.narrow(d, 0, 1)
        mask = (mask & (values == first)).all(d, keepdim=True)
        values = first
    return Known(values, mask)


def _finite(values: Tensor, mask: Tensor, rank: int) -> Known:
    if values.dtype.is_floating_point:
        mask = mask & values.isfinite()
    values, mask = torch.broadcast_tensors(values, mask)
    while values.ndim < rank:
        values, mask = values[None], mask[None]
    return Known(values, mask)


# ---------------------------------------------------------------------------------------------------- element by element


def _pointwise(state: _State, node: fx.Node) -> Known | None:
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if len(tensors) != len(node.all_input_nodes):
        return None
    if node.target is aten.mul.Tensor and len(tensors) == len(node.args):
        return _product(state, node)
    if any(state.get(n) is None for n in tensors):
        return None

    def value(argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: state.found[n].values)

    mask = torch.ones((), dtype=torch.bool)
    for n in tensors:
        mask = mask & state.found[n].mask
    if not mask.any():
        return None
    result = node.target(*value(node.args), **value(node.kwargs))
    return _finite(result, mask, node.meta["val"].ndim)


def _product(state: _State, node: fx.Node) -> Known | None:
    a, b = (state.get(n) for n in node.args)
    rank, dtype = node.meta["val"].ndim, node.meta["val"].dtype
    if a is None or b is None:
        one = a or b
        return None if one is None else _finite(torch.zeros_like(one.values, dtype=dtype), one.zeros(), rank)
    both = a.mask & b.mask
    values = torch.where(both, a.values * b.values, torch.zeros((), dtype=dtype))
    return _finite(values, both | a.zeros() | b.zeros(), rank)


def _prelu(state: _State, node: fx.Node) -> Known | None:
    known, weight = state.get(node.args[0]), state.get(node.args[1])
    rank = node.meta["val"].ndim
    if known is None or weight is None or not weight.is_complete or rank < 2:
        return None
    slope = weight.values.reshape(-1, *[1] * (rank - 2))
    return _finite(torch.where(known.values > 0, known.values, known.values * slope), known.mask, rank)


def _glu(state: _State, node: fx.Node) -> Known | None:
    known, rank = state.get(node.args[0]), node.meta["val"].ndim
    d = (node.args[1] if len(node.args) > 1 else -1) % rank
    size = _shape(node.args[0])[d]
    if known is None or not isinstance(size, int):
        return None
    a, b = (_widened(known, d, size).map(lambda t, i=i: t.chunk(2, d)[i]) for i in (0, 1))
    both = a.mask & b.mask
    return _finite(torch.where(both, a.values * b.values.sigmoid(), 0), both | a.zeros(), rank)


def _cast(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    return known and Known(known.values.to(node.meta["val"].dtype), known.mask)


def _same(state: _State, node: fx.Node) -> Known | None:
    return state.get(node.args[0])


def _filled(number: Any) -> Callable[[_State, fx.Node], Known | None]:
    """A tensor of one number: `number`, or the argument at that place."""

    def rule(state: _State, node: fx.Node) -> Known | None:
        value = node.meta["val"]
        argument = node.args[number[0]] if isinstance(number, tuple) else number
        if not isinstance(argument, (int, float, bool)):
            return None
        values = torch.full((1,) * value.ndim, argument, dtype=value.dtype)
        return Known(values, torch.ones_like(values, dtype=torch.bool))

    return rule


# ---------------------------------------------------------------------------------------------------- products


def _linear(state: _State, node: fx.Node) -> Known | None:
    weight, bias = state.get(node.args[1]), state.get(node.args[2]) if len(node.args) > 2 else None
    if weight is None or not weight.is_complete or (len(node.args) > 2 and node.args[2] is not None and bias is None):
        return None
    if weight.values.ndim != 2:
        return None
    matrix = weight.values.expand(_shape(node.args[1]))
    known, lead = state.get(node.args[0]), (1,) * (node.meta["val"].ndim - 1)
    if known is None:
        result = ~matrix.any(dim=1)
        values = torch.zeros(matrix.shape[0], dtype=matrix.dtype)
        values, result = values.reshape(*lead, -1), result.reshape(*lead, -1)
    else:
        known = _widened(known, -1, matrix.shape[1])
        unknown = (~known.mask).to(torch.float32)
        result = unknown @ (matrix != 0).to(torch.float32).t() == 0
        values = (torch.where(known.mask, known.values, 0).double() @ matrix.double().t()).to(matrix.dtype)
    if bias is not None:
        values, result = values + bias.values, result & bias.mask
    return _finite(values, result, len(lead) + 1)


def _grouped_linear(state: _State, node: fx.Node) -> Known | None:
    weight, known = state.get(node.args[1]), state.get(node.args[0])
    if weight is None or not weight.is_complete:
        return None
    matrices = weight.values
    if known is None:
        result = ~matrices.any(dim=2).any(dim=0)
        return Known(torch.zeros(1, matrices.shape[1], dtype=matrices.dtype), result[None])
    known = _widened(_uniform(known, [0]), -1, matrices.shape[2])
    unknown = (~known.mask).to(torch.float32)
    result = (unknown @ (matrices != 0).to(torch.float32).transpose(1, 2) == 0).all(0)
    values = (torch.where(known.mask, known.values, 0).double() @ matrices.double().transpose(1, 2)).to(matrices.dtype)
    # Which expert a token goes to is not known: they have to agree.
    return Known(values[0], result & (values == values[:1]).all(0))


def pads(node: fx.Node) -> bool:
    """Whether a convolution adds zeros at the border."""
    padding = node.args[4] if len(node.args) > 4 else 0
    return padding == "same" or any(padding if isinstance(padding, (list, tuple)) else [0 if padding == "valid" else padding])


def _convolution(state: _State, node: fx.Node) -> Known | None:
    weight, bias = state.get(node.args[1]), state.get(node.args[2]) if len(node.args) > 2 else None
    if weight is None or not weight.is_complete or (len(node.args) > 2 and node.args[2] is not None and bias is None):
        return None
    kernel = weight.values.expand(_shape(node.args[1]))
    outputs, inner = kernel.shape[:2]
    groups = node.args[6] if len(node.args) > 6 else 1
    reads = kernel.reshape(outputs, inner, -1).any(2)  # [O, I/g]
    known, rank = state.get(node.args[0]), kernel.ndim
    sums = kernel.double().reshape(outputs, inner, -1).sum(2)
    if known is not None:
        known = _widened(_uniform(known, [0, *range(2, rank)]), 1, groups * inner)
        constant, values = known.mask.reshape(groups, 1, inner), known.values.reshape(groups, 1, inner)
        if pads(node):
            constant = constant & (values == 0)
        result = ~(reads.reshape(groups, -1, inner) & ~constant).any(2)
        sums = (sums.reshape(groups, -1, inner) * torch.where(constant, values, 0).double()).sum(2)
        values, result = sums.reshape(-1), result.reshape(-1)
    else:
        values, result = torch.zeros(outputs, dtype=torch.float64), ~reads.any(1)
    values = values.to(kernel.dtype)
    if bias is not None:
        values, result = values + bias.values, result & bias.mask
    shape = (1, outputs, *[1] * (rank - 2))
    return _finite(values.reshape(shape), result.reshape(shape), rank)


def _transposed_convolution(state: _State, node: fx.Node) -> Known | None:
    """A channel to which nothing is added is its bias. Constants other than zero come out as others at the border."""
    weight, bias = state.get(node.args[1]), state.get(node.args[2]) if len(node.args) > 2 else None
    if weight is None or not weight.is_complete or (len(node.args) > 6 and node.args[6] > 1):
        return None
    if len(node.args) > 2 and isinstance(node.args[2], fx.Node) and bias is None:
        return None
    rank, kernel = node.meta["val"].ndim, weight.values.expand(_shape(node.args[1]))
    if kernel.ndim != rank:
        return None
    reads = kernel.flatten(2).any(2)  # [I, O]
    known = state.get(node.args[0])
    if known is not None:
        zeros = _uniform(known, [0, *range(2, rank)]).zeros().reshape(-1, 1)
        reads = reads & ~zeros
    shape = (1, kernel.shape[1], *[1] * (rank - 2))
    values = torch.zeros(kernel.shape[1], dtype=kernel.dtype) if bias is None else bias.values.expand(kernel.shape[1])
    mask = ~reads.any(0) & (True if bias is None else bias.mask)
    return _finite(values.reshape(shape), mask.reshape(shape), rank)


def _zero_rows_and_columns(a: Known | None, b: Known | None, node: fx.Node) -> Known | None:
    """a @ b is zero in the rows where a is and in the columns where b is."""
    rank, mask = node.meta["val"].ndim, torch.zeros((), dtype=torch.bool)
    if a is not None:
        mask = mask | a.zeros().all(-1, keepdim=True)
    if b is not None:
        mask = mask | b.zeros().all(-2, keepdim=True)
    return None if not mask.any() else _finite(torch.zeros(mask.shape, dtype=node.meta["val"].dtype), mask, rank)


def _matmul(state: _State, node: fx.Node) -> Known | None:
    if min(n.meta["val"].ndim for n in node.args[:2]) < 2:
        return None
    return _zero_rows_and_columns(state.get(node.args[0]), state.get(node.args[1]), node)


def _attention(state: _State, node: fx.Node) -> Known | None:
    """A constant value is passed on: the weights add up to one. With a mask they may be all zero, after dropout they are
    others, and only zero passes."""
    known = state.get(node.args[2])
    if known is None or len(_shape(node)) < 3:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    known = _uniform(known, [known.values.ndim - 2])
    heads, given = _shape(node)[-3], known.values.shape[-3]
    if 1 < given < heads:
        known = known.map(lambda t: t.repeat_interleave(heads // given, -3))
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return known if mask is None and not dropout else Known(known.values, known.zeros())


# ---------------------------------------------------------------------------------------------------- norms


def _is_given(known: Known | None, argument: Any) -> bool:
    """Whether all of a parameter that is a tensor is known."""
    return not isinstance(argument, fx.Node) or (known is not None and known.is_complete)


def _batch_norm(state: _State, node: fx.Node) -> Known | None:
    known, parameters = state.get(node.args[0]), [state.get(a) for a in node.args[1:5]]
    if node.args[5] or not all(_is_given(p, a) for p, a in zip(parameters, node.args[1:5])):
        return None  # in training mode it depends on the batch
    shape = (1, -1, *[1] * (node.meta["val"].ndim - 2))
    weight, bias, mean, variance = (None if p is None else p.values.double().reshape(shape) for p in parameters)
    scale = (variance + node.args[7]).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    dead = scale == 0
    values = shift if known is None else torch.where(known.mask, known.values.double(), 0) * scale + shift
    return _finite(values.to(node.meta["val"].dtype), dead if known is None else dead | known.mask, node.meta["val"].ndim)


def _layer_norm(state: _State, node: fx.Node) -> Known | None:
    known, last = state.get(node.args[0]), len(node.args[1])
    parameters = [state.get(a) for a in node.args[2:4]]
    if not all(_is_given(p, a) for p, a in zip(parameters, node.args[2:4])):
        return None
    rank = node.meta["val"].ndim
    if known is not None and known.mask.flatten(-last).all(-1).any():
        for d, size in enumerate(node.args[1], rank - last):
            known = _widened(known, d, size)
        arguments = [a if not isinstance(a, fx.Node) else state.found[a].values for a in node.args[1:]]
        values = node.target(known.values, *arguments, **node.kwargs)
        everything = known.mask.flatten(-last).all(-1).reshape(*known.mask.shape[:-last], *[1] * last)
        return _finite(values, everything, rank)
    weight, bias = [*parameters, None][:2]
    if weight is None:
        return None
    zero = weight.zeros()
    values = torch.zeros_like(weight.values) if bias is None else bias.values
    return _finite(values, zero, rank)


def _group_norm(state: _State, node: fx.Node) -> Known | None:
    """A group of constant channels is normalised to constants; a channel of scale zero is its bias."""
    known, (_, channels) = state.get(node.args[0]), _shape(node.args[0])[:2]
    groups, rank = node.args[1], node.meta["val"].ndim
    weight, bias = (state.get(a) for a in (*node.args[2:4], None, None)[:2])
    if any(isinstance(a, fx.Node) and state.get(a) is None for a in node.args[2:4]):
        return None
    shape = (1, channels, *[1] * (rank - 2))
    if known is not None:
        known = _widened(_uniform(known, [0, *range(2, rank)]), 1, channels)
        whole = known.mask.reshape(groups, -1).all(1).repeat_interleave(channels // groups).reshape(shape)
        if whole.any():
            numbers = [a if not isinstance(a, fx.Node) else state.found[a].values for a in node.args[1:]]
            return _finite(node.target(known.values, *numbers, **node.kwargs), whole, rank)
    if weight is None:
        return None
    values = torch.zeros_like(weight.values) if bias is None else bias.values
    return _finite(values.reshape(shape), weight.zeros().reshape(shape), rank)


def _mean(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    if known is None or len(node.args) < 2 or not node.args[1]:
        return None
    rank = known.values.ndim
    dims = [d % rank for d in node.args[1]]
    for d in dims:
        size = _shape(node.args[0])[d]
        known = _widened(known, d, size) if isinstance(size, int) else _uniform(known, [d])
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    values, mask = known.values.to(node.meta["val"].dtype).mean(dims, keepdim=True), known.mask
    for d in dims:
        mask = mask.all(d, keepdim=True)
    if not keep:
        for d in sorted(dims, reverse=True):
            values, mask = values.squeeze(d), mask.squeeze(d)
    return Known(values, mask)


# ---------------------------------------------------------------------------------------------------- the same data


def _permute(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    return known and known.map(lambda t: node.target(t, *node.args[1:]))


def _reshape(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    if known is None:
        return None
    before, after = _shape(node.args[0]), _shape(node)
    sizes, order = [1] * len(after), []
    for ins, outs in regroup(before, after):
        is_static = all(isinstance(before[i], int) for i in ins) and all(isinstance(after[o], int) for o in outs)
        if not is_static:
            known = _uniform(known, ins)
            continue
        if all(known.values.shape[i] == 1 for i in ins):
            continue
        for i in ins:
            known = _widened(known, i, before[i])
        for o in outs:
            sizes[o] = after[o]
        order += ins
    return known.map(lambda t: t.reshape(sizes))


def _expand(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    missing = node.meta["val"].ndim - len(_shape(node.args[0]))
    return known and known.map(lambda t: t[(None,) * missing])


def _slice(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    if known is None:
        return None
    dim = node.args[1] if len(node.args) > 1 else 0
    if known.values.shape[dim] == 1:
        return known
    if any(isinstance(a, fx.Node) for a in node.args[1:]) or not isinstance(_shape(node)[dim], int):
        return _uniform(known, [dim % known.values.ndim])
    return known.map(lambda t: node.target(t, *node.args[1:]))


def _split(state: _State, node: fx.Node) -> list[Known | None] | None:
    known = state.get(node.args[0])
    if known is None:
        return None
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if known.values.shape[dim] == 1:
        return [known] * len(sizes)
    if not all(isinstance(s, int) for s in sizes):
        return None
    return [Known(v, m) for v, m in zip(known.values.split(sizes, dim), known.mask.split(sizes, dim), strict=True)]


def _select(state: _State, node: fx.Node) -> Any:
    known = state.get(node.args[0])
    if known is None:
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    whole = known.values.shape[dim] == 1
    if node.target is aten.unbind.int:
        return [known.map(lambda t, i=i: t.select(dim, 0 if whole else i)) for i in range(len(node.meta["val"]))]
    index = node.args[2]
    if not whole and not isinstance(index, int):
        return None
    return known.map(lambda t: t.select(dim, 0 if whole else index))


def _cat(state: _State, node: fx.Node) -> Known | None:
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % node.meta["val"].ndim
    # What a past is joined to in order to give the present tells what the past was. An empty vector may be anywhere.
    parts = [n for n in node.args[0] if state.past.get(n) is not node and tuple(n.meta["val"].shape) != (0,)]
    known = [state.get(n) for n in parts]
    if not isinstance(_shape(node)[dim], int):
        if any(k is None for k in known):
            return None
        known = [_uniform(k, [dim]) for k in known]
        mask, values = known[0].mask, known[0].values
        for other in known[1:]:
            mask = mask & other.mask & (values == other.values)
        return Known(*torch.broadcast_tensors(values, mask))
    if all(k is None for k in known):
        return None
    sizes = list(torch.broadcast_shapes(*(
        [1 if d == dim else s for d, s in enumerate(k.values.shape)] for k in known if k is not None
    )))  # fmt: skip
    values, masks = [], []
    for n, k in zip(parts, known, strict=True):
        size = [_shape(n)[dim] if d == dim else s for d, s in enumerate(sizes)]
        nothing = k is None
        values.append(torch.zeros(size, dtype=node.meta["val"].dtype) if nothing else k.values.expand(size))
        masks.append(torch.zeros(size, dtype=torch.bool) if nothing else k.mask.expand(size))
    return Known(torch.cat(values, dim), torch.cat(masks, dim))


def _index(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    if known is None:
        return None
    indices = node.args[1]
    looked_up = [d for d, i in enumerate(indices) if i is not None]
    known = _uniform(known, looked_up)
    rank = max(indices[d].meta["val"].ndim for d in looked_up)
    if any(indices[d].meta["val"].dtype == torch.bool for d in looked_up):
        return None
    place = looked_up[0] if looked_up == list(range(looked_up[0], looked_up[-1] + 1)) else 0
    others = [s for d, s in enumerate(known.values.shape) if d not in looked_up]
    return known.map(lambda t: t.reshape(*others[:place], *[1] * rank, *others[place:]))


def _index_select(state: _State, node: fx.Node) -> Known | None:
    known, index = state.get(node.args[0]), state.get(node.args[2])
    dim = node.args[1]
    if known is None or known.values.shape[dim] == 1:
        return known
    if index is None or not index.is_complete:
        return _uniform(known, [dim % known.values.ndim])
    return known.map(lambda t: t.index_select(dim, index.values))


def _repeat_interleave(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if known is None or dim is None or not isinstance(node.args[1], int):
        return None
    return known if known.values.shape[dim] == 1 else known.map(lambda t: t.repeat_interleave(node.args[1], dim))


def _embedding(state: _State, node: fx.Node) -> Known | None:
    table = state.get(node.args[0])
    if table is None or not table.is_complete:
        return None
    known = _uniform(table, [0])
    return known.map(lambda t: t.reshape(*[1] * (node.meta["val"].ndim - 1), -1))


def _pool(state: _State, node: fx.Node) -> Known | None:
    """A channel of one number stays that; where zeros are averaged in at the border only zero does."""
    known = state.get(node.args[0])
    if known is None:
        return None
    rank, kernel = known.values.ndim, node.args[1]
    spatial = len(kernel) if isinstance(kernel, (list, tuple)) else rank - 2
    known = _uniform(known, list(range(rank - spatial, rank)))
    is_average = "avg_pool" in str(node.target) and "adaptive" not in str(node.target)
    return Known(known.values, known.zeros()) if is_average else known


def _upsample(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    return known and _uniform(known, list(range(2, known.values.ndim)))


def _pad(state: _State, node: fx.Node) -> Known | None:
    known = state.get(node.args[0])
    if known is None or not any(node.args[1]):
        return known
    rest = list(node.args[2:])
    mode = rest.pop(0) if rest and isinstance(rest[0], str) else node.kwargs.get("mode", "constant")
    number = rest[0] if rest else node.kwargs.get("value")
    padded = [known.values.ndim - 1 - i // 2 for i in range(0, len(node.args[1]), 2) if node.args[1][i] or node.args[1][i + 1]]
    known = _uniform(known, padded)
    return known if mode != "constant" else Known(known.values, known.mask & (known.values == (number or 0)))


def _getitem(state: _State, node: fx.Node) -> Known | None:
    parts = state.found.get(node.args[0])
    return parts[node.args[1]] if isinstance(parts, list) else None


def _rules(rule: Callable[[_State, fx.Node], Any], *targets: Any) -> dict[Any, Callable[[_State, fx.Node], Any]]:
    return dict.fromkeys(targets, rule)


_RULES: dict[Any, Callable[[_State, fx.Node], Any]] = {
    **_rules(
        _pointwise, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.relu6.default,
        aten.square.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.selu.default, aten.mish.default, aten.softplus.default,
        aten.hardswish.default, aten.hardsigmoid.default, aten.log_sigmoid.default, aten.min.other, aten.max.other,
    ),
    **_rules(_cast, aten.to.dtype, aten._to_copy.default, aten.type_as.default),
    **_rules(
        _same, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default,
    ),
    **_rules(_filled(0), aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
    **_rules(_filled(1), aten.ones.default, aten.ones_like.default, aten.new_ones.default),
    **_rules(_filled((1,)), aten.full.default, aten.full_like.default),
    **_rules(_filled((2,)), aten.new_full.default),
    **_rules(_linear, aten.linear.default),
    **_rules(_grouped_linear, ops.GROUPED_LINEAR),
    **_rules(
        _convolution, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
        aten.conv2d.padding, aten.conv3d.padding,
    ),
    **_rules(
        _transposed_convolution, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    ),
    **_rules(
        _upsample, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_linear1d.vec,
        aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    ),
    **_rules(_glu, aten.glu.default),
    **_rules(_prelu, aten.prelu.default),
    **_rules(_matmul, aten.matmul.default, aten.bmm.default, aten.mm.default),
    **_rules(_attention, aten.scaled_dot_product_attention.default),
    **_rules(_batch_norm, aten.batch_norm.default),
    **_rules(_layer_norm, aten.layer_norm.default, aten.rms_norm.default),
    **_rules(_group_norm, aten.group_norm.default),
    **_rules(_mean, aten.mean.dim),
    **_rules(
        _permute, aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.movedim.int,
        aten.movedim.intlist, aten.swapaxes.default, aten.swapdims.default, aten.mT.default,
    ),
    **_rules(
        _reshape, aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
        aten.reshape_as.default, aten.view_as.default,
    ),
    **_rules(_expand, aten.expand.default, aten.broadcast_to.default, aten.expand_as.default),
    **_rules(_slice, aten.slice.Tensor),
    **_rules(_split, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes),
    **_rules(_select, aten.select.int, aten.unbind.int),
    **_rules(_cat, aten.cat.default, aten.concat.default),
    **_rules(_index, aten.index.Tensor),
    **_rules(_index_select, aten.index_select.default),
    **_rules(_repeat_interleave, aten.repeat_interleave.self_int),
    **_rules(_embedding, aten.embedding.default),
    **_rules(
        _pool, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
        aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    ),
    **_rules(_pad, aten.pad.default, aten.constant_pad_nd.default),
    operator.getitem: _getitem,
}  # fmt: skip
