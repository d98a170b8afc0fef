"""How each operator relates the axes of what it takes to the axes of what it gives: one transfer rule for each.

An operator that sums over a dimension of its operands has a `Site` there; one that reads an axis through a fixed index has a
`Link`. An operator without a rule pins everything it touches, so that a new one costs possibilities and never correctness.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.analysis.axis import (
    DYNAMIC,
    ONE,
    Atom,
    Axis,
    Mismatch,
    cut,
    give_role,
    pin,
    product_of,
    resolve,
    split,
    sum_of,
    unify,
)  # fmt: skip
from fxc.analysis.shapes import regroup
from fxc.ir.program import Program, users_of
from fxc.schemes import ops

aten = torch.ops.aten
Dims = tuple[Axis, ...]
"""The axes of a tensor; a tuple of them for a value of several tensors."""


@dataclass(frozen=True)
class Site:
    """Where `node` sums over `axis`. reads: (argument, dimension) of the operands that have it; an argument within a list
    is a tuple of two indices."""

    node: fx.Node
    axis: Axis
    reads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Link:
    """Index i of `result` is a copy of index `index[i]` of `source`: query heads that share their keys and values. copies:
    the axis that an expand made and a reshape merged, if that is how it is written."""

    node: fx.Node
    result: Atom
    source: Axis
    index: Tensor
    copies: Atom | None = None


@dataclass
class Axes:
    """What `analyse` found: the axes of every value and constant, the sites and the links."""

    program: Program
    values: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[str, Dims] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    copies: dict[Atom, fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Dims:
        return tuple(resolve(a) for a in self.values[node])

    def pin_all(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            for axis in _every(self.values.get(source, ())):
                pin(axis, why)


def _every(dims: Any) -> list[Axis]:
    return [axis for part in dims for axis in (_every(part) if isinstance(part, tuple) else [part])]


def fresh(value: Any, why: str | None = None) -> Any:
    """New atoms for the dimensions of a value, pinned for the reason `why` if there is one."""
    if isinstance(value, Tensor):
        return tuple(_fresh(size, why) for size in value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(fresh(v, why) for v in value)
    return ()


def _fresh(size: Any, why: str | None = None) -> Axis:
    if not isinstance(size, int):
        return DYNAMIC
    return ONE if size == 1 else Atom(size, why)


def join(a: Axis, b: Axis) -> Axis:
    """The axis of two dimensions that meet: the same one, or the one that the other is broadcast along."""
    # A single index never goes, whatever it is a part of.
    if a.size == 1:
        return b
    if b.size == 1 or a is b:
        return a
    unify(a, b)
    return a


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


# ---------------------------------------------------------------------------------------------------- einsum-like rules

EINSUM = {
    aten.mm.default: "m k, k n -> m n",
    aten.bmm.default: "b m k, b k n -> b m n",
    aten.embedding.default: "!row d, ... -> ... d",
    ops.GROUPED_LINEAR: "t k, !expert n k, !expert -> t n",
    ops.GROUPED_MM: "t k, !expert k n, !expert -> t n",
}
"""A letter that stands twice is one axis; one that is not in the result is summed over, which makes a site; "..." are any
dimensions, broadcast from the right; what is marked with "!" is chosen by number and keeps its size."""
_CHOSEN = {"row": "its rows are looked up by number", "expert": "experts are chosen by number"}


def _by_spec(axes: Axes, node: fx.Node, spec: str) -> Dims:
    left, right = spec.split("->")
    letters: dict[str, Axis] = {}
    reads: dict[str, list[tuple[int, int]]] = {}
    rest: list[Axis] = []
    for position, operand in enumerate(left.split(",")):
        argument = node.args[position] if position < len(node.args) else None
        if not isinstance(argument, fx.Node):
            continue
        dims = axes.values[argument]
        before, dots, after = operand.strip().partition("...")
        first, last = before.split(), after.split()
        named = list(zip(first, range(len(first)))) + list(zip(last, range(len(dims) - len(last), len(dims))))
        for name, dimension in named:
            letter = name.lstrip("!")
            letters[letter] = join(letters.get(letter, ONE), dims[dimension])
            reads.setdefault(letter, []).append((position, dimension))
            if name.startswith("!"):
                pin(dims[dimension], _CHOSEN[letter])
                give_role(dims[dimension], letter)
        if dots:
            rest = _broadcast([rest, list(dims[len(first) : len(dims) - len(last)])])
    result = right.split()
    for letter, axis in letters.items():
        if letter not in result and len(reads[letter]) > 1 and letter not in _CHOSEN:
            axes.sites.append(Site(node, axis, tuple(reads[letter])))
    return tuple(axis for name in result for axis in (rest if name == "..." else [letters[name]]))


def _linear(axes: Axes, node: fx.Node) -> Dims:
    if len(axes.values[node.args[1]]) != 2:
        return _pinned(f"{_name(node)} with a vector")(axes, node)
    return _by_spec(axes, node, "... i, o i, o -> ... o")


def _batch_norm(axes: Axes, node: fx.Node) -> Dims:
    if node.args[5]:
        for d, axis in enumerate(axes.values[node.args[0]]):
            if d != 1:
                pin(axis, "it is normalised over")
    return _by_spec(axes, node, "n c ..., c, c, c, c -> n c ...")


def _broadcast(shapes: Sequence[Sequence[Axis]]) -> list[Axis]:
    result: list[Axis] = [ONE] * max((len(s) for s in shapes), default=0)
    for shape in shapes:
        offset = len(result) - len(shape)
        for i, axis in enumerate(shape):
            result[offset + i] = join(result[offset + i], axis)
    return result


# ---------------------------------------------------------------------------------------------------- element by element


def _pointwise(axes: Axes, node: fx.Node) -> Dims:
    result = tuple(_broadcast([axes.values[n] for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]))
    # All of them may be of size 1 where the result has a size of its own.
    return result if len(result) == node.meta["val"].ndim else fresh(node.meta["val"])


def _prelu(axes: Axes, node: fx.Node) -> Dims:
    """Its weight is one number, or one for each channel."""
    source, weight = axes.values[node.args[0]], axes.values[node.args[1]]
    if len(source) > 1 and weight:
        join(source[1], weight[0])
    return tuple(source)


def _like_first(axes: Axes, node: fx.Node) -> Dims:
    return tuple(axes.values[node.args[0]])


def _new(axes: Axes, node: fx.Node) -> Dims:
    """A tensor of the sizes in the arguments: it has the axes of whatever it meets."""
    return fresh(node.meta["val"])


# ---------------------------------------------------------------------------------------------------- dims that are kept


def _dims(node: fx.Node, argument: Any, rank: int) -> list[int]:
    if argument is None or argument == []:
        return list(range(rank))
    return [d % rank for d in (argument if isinstance(argument, (list, tuple)) else [argument])]


def _resized(axis: Axis, size: Any, why: str) -> Axis:
    return axis if isinstance(size, int) and size == axis.size and axis is not DYNAMIC else _fresh(size, why)


def _along(dimension_argument: int, why: str, default: Any = None) -> Callable[[Axes, fx.Node], Any]:
    """A rule for operators that need every index of some dimensions, which they keep or reduce, and treat others alike."""

    def rule(axes: Axes, node: fx.Node) -> Any:
        source = axes.values[node.args[0]]
        given = node.args[dimension_argument] if len(node.args) > dimension_argument else node.kwargs.get("dim", default)
        along = _dims(node, given, len(source))
        for d in along:
            pin(source[d], why)

        def of(value: Tensor) -> Dims:
            if value.ndim == len(source):
                return tuple(_resized(a, value.shape[d], why) if d in along else a for d, a in enumerate(source))
            return tuple(a for d, a in enumerate(source) if d not in along)

        value = node.meta["val"]
        return of(value) if isinstance(value, Tensor) else tuple(of(v) for v in value)

    return rule


def _normalised(shape_argument: int) -> Callable[[Axes, fx.Node], Dims]:
    def rule(axes: Axes, node: fx.Node) -> Dims:
        source = axes.values[node.args[0]]
        last = len(node.args[shape_argument])
        for axis in source[-last:]:
            pin(axis, "it is normalised over")
        for parameter in node.args[shape_argument + 1 : shape_argument + 3]:
            if isinstance(parameter, fx.Node):
                for a, b in zip(axes.values[parameter], source[-last:], strict=True):
                    join(a, b)
        return tuple(source)

    return rule


def _pinned(why: str) -> Callable[[Axes, fx.Node], Any]:
    def rule(axes: Axes, node: fx.Node) -> Any:
        axes.pin_all(node, why)
        return fresh(node.meta["val"], why)

    return rule


def _group_norm(axes: Axes, node: fx.Node) -> Dims:
    source = axes.values[node.args[0]]
    for axis in source[1:]:
        pin(axis, "it is normalised over in groups")
    for parameter in node.all_input_nodes[1:]:
        join(axes.values[parameter][0], source[1])
    return tuple(source)


# ---------------------------------------------------------------------------------------------------- products


def _matmul(axes: Axes, node: fx.Node) -> Dims:
    a, b = (axes.values[n] for n in node.args[:2])
    if min(len(a), len(b)) < 2:
        return _pinned(f"{_name(node)} of a vector")(axes, node)
    batch = _broadcast([a[:-2], b[:-2]])
    inner = join(a[-1], b[-2])
    axes.sites.append(Site(node, inner, ((0, len(a) - 1), (1, len(b) - 2))))
    if batch and not any(n.op == "get_attr" for n in node.args[:2]):
        give_role(batch[-1], "head")
        for axis in (a[-2], inner, b[-1]):
            give_role(axis, "head_dim")
    return (*batch, a[-2], b[-1])


def _addmm(axes: Axes, node: fx.Node) -> Dims:
    bias, a, b = (axes.values[n] for n in node.args[:3])
    inner = join(a[-1], b[-2])
    axes.sites.append(Site(node, inner, ((1, len(a) - 1), (2, len(b) - 2))))
    return tuple(_broadcast([[*_broadcast([a[:-2], b[:-2]]), a[-2], b[-1]], bias]))


def _einsum(axes: Axes, node: fx.Node) -> Dims:
    equation, operands = node.args[0], node.args[1]
    if "." in equation or "->" not in equation:
        return _pinned(_name(node))(axes, node)
    left, result = equation.replace(" ", "").split("->")
    letters: dict[str, Axis] = {}
    reads: dict[str, list[tuple[int, int]]] = {}
    for position, (names, operand) in enumerate(zip(left.split(","), operands, strict=True)):
        for dimension, letter in enumerate(names):
            letters[letter] = join(letters.get(letter, ONE), axes.values[operand][dimension])
            reads.setdefault(letter, []).append((position, dimension))
    for letter, axis in letters.items():
        if letter not in result:
            pin(axis, "it is summed over by einsum")
    return tuple(letters[letter] for letter in result)


def _attention(axes: Axes, node: fx.Node) -> Dims:
    query, key, value = (axes.values[n] for n in node.args[:3])
    if len(query) < 3:
        return _pinned(f"{_name(node)} without a batch")(axes, node)
    if node.kwargs.get("enable_gqa", False) and key[-3].size != value[-3].size:
        return _pinned("its keys and values have different numbers of heads")(axes, node)
    width = join(query[-1], key[-1])
    axes.sites.append(Site(node, width, ((0, len(query) - 1), (1, len(key) - 1))))
    length = join(key[-2], value[-2])
    pin(length, "it is attended over")
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal", False):
        pin(query[-2], "its indices are places")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    batch = list(query[:-2])
    shared = node.kwargs.get("enable_gqa", False) and query[-3].size != key[-3].size
    others = [list(d[:-3]) + ([] if shared else [d[-3]]) for d in (key, value)]
    if shared:
        joined = join(key[-3], value[-3])
        index = torch.arange(key[-3].size).repeat_interleave(query[-3].size // key[-3].size)
        result = Atom(query[-3].size)
        unify(result, query[-3])
        give_role(joined, "kv_head")
        if isinstance(resolve(result), Atom):
            axes.links.append(Link(node, resolve(result), joined, index))
        else:
            pin(joined, "its query heads are divided")
            pin(result, "its heads share keys in another way than they are divided")
        batch = _broadcast([batch, [*_broadcast([o for o in others]), ONE]])
    else:
        batch = _broadcast([batch, *others])
    give_role(batch[-1], "head")
    for axis in (width, value[-1]):
        give_role(axis, "head_dim")
    if isinstance(mask, fx.Node):
        _broadcast([[*batch, query[-2], length], axes.values[mask]])
    return (*batch, query[-2], value[-1])


def _convolution(axes: Axes, node: fx.Node) -> Dims:
    source, weight = (axes.values[n] for n in node.args[:2])
    value = node.meta["val"]
    if value.ndim != len(source) or len(source) != len(weight):
        return _pinned(f"{_name(node)} without a batch")(axes, node)
    groups = node.args[6] if len(node.args) > 6 else 1
    for axis in source[2:]:
        pin(axis, "a convolution slides over it")
    for axis in weight[2:]:
        pin(axis, "it is a kernel's height or width")
    out, inner = weight[0], weight[1]
    if groups > 1:
        try:
            group, _ = split(out, groups)
            unify(source[1], product_of(group, inner))
            if resolve(inner) != ONE:
                give_role(group, "conv_group")
        except Mismatch:
            pin(out, "its groups are not parts of it")
            pin(source[1], "its groups are not parts of it")
            pin(inner, "its groups are not parts of it")
    else:
        join(source[1], inner)
    if inner != ONE:
        axes.sites.append(Site(node, inner, ((0, 1), (1, 1))))
    give_role(out, "channel")
    if len(node.args) > 2 and isinstance(node.args[2], fx.Node):
        join(axes.values[node.args[2]][0], out)
    return (source[0], out, *(_fresh(s, "it is a height or a width") for s in value.shape[2:]))


def _transposed_convolution(axes: Axes, node: fx.Node) -> Dims:
    source, weight = (axes.values[n] for n in node.args[:2])
    value = node.meta["val"]
    if value.ndim != len(source) or (len(node.args) > 6 and node.args[6] > 1):
        return _pinned(f"{_name(node)} in groups or without a batch")(axes, node)
    for axis in (*source[2:], *weight[2:]):
        pin(axis, "a convolution slides over it")
    axes.sites.append(Site(node, join(source[1], weight[0]), ((0, 1), (1, 0))))
    give_role(weight[1], "channel")
    if len(node.args) > 2 and isinstance(node.args[2], fx.Node):
        join(axes.values[node.args[2]][0], weight[1])
    return (source[0], weight[1], *(_fresh(s, "it is a height or a width") for s in value.shape[2:]))


def _pool(axes: Axes, node: fx.Node) -> Dims:
    source, value = axes.values[node.args[0]], node.meta["val"]
    spatial = len(node.args[1]) if isinstance(node.args[1], (list, tuple)) else len(source) - 2
    for axis in source[-spatial:]:
        pin(axis, "it is pooled over")
    return (*source[:-spatial], *(_fresh(s, "it is a height or a width") for s in value.shape[-spatial:]))


def _upsample(axes: Axes, node: fx.Node) -> Dims:
    source, value = axes.values[node.args[0]], node.meta["val"]
    for axis in source[2:]:
        pin(axis, "it is interpolated")
    return (*source[:2], *(_fresh(s, "it is a height or a width") for s in value.shape[2:]))


def _glu(axes: Axes, node: fx.Node) -> Dims:
    """The first half of a dimension, gated by the second."""
    dims = list(axes.values[node.args[0]])
    d = (node.args[1] if len(node.args) > 1 else -1) % len(dims)
    half = dims[d].size // 2
    try:
        if dims[d] is DYNAMIC:
            raise Mismatch
        dims[d] = join(_piece(dims[d], 0, half), _piece(dims[d], half, 2 * half))
    except Mismatch:
        pin(dims[d], "it is cut within a part")
        dims[d] = _fresh(node.meta["val"].shape[d], "it is cut within a part")
    return tuple(dims)


# ---------------------------------------------------------------------------------------------------- the same data


def _permute(axes: Axes, node: fx.Node) -> Dims:
    source = axes.values[node.args[0]]
    return tuple(source[d % len(source)] for d in node.args[1])


def _transpose(axes: Axes, node: fx.Node) -> Dims:
    dims = list(axes.values[node.args[0]])
    if len(dims) > 1:
        i, j = (d % len(dims) for d in (node.args[1:3] if len(node.args) > 1 else (0, 1)))
        dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


def _reverse(axes: Axes, node: fx.Node) -> Dims:
    return tuple(reversed(axes.values[node.args[0]]))


def _reorder(axes: Axes, node: fx.Node) -> Dims:
    source = axes.values[node.args[0]]
    numbered = torch.empty([*range(1, len(source) + 1)], device="meta")
    return tuple(source[number - 1] for number in node.target(numbered, *node.args[1:]).shape)


def _reshape(axes: Axes, node: fx.Node) -> Dims:
    """Reshape, flatten, squeeze, unsqueeze: groups of dimensions whose products are the same."""
    source, value = axes.values[node.args[0]], node.meta["val"]
    result: list[Axis] = [ONE] * value.ndim
    for ins, outs in regroup(node.args[0].meta["val"].shape, value.shape):
        if any(source[i] is DYNAMIC for i in ins) or any(not isinstance(value.shape[o], int) for o in outs):
            if len(ins) > 1 or len(outs) > 1:
                why = "it is merged with a dimension whose size is known only when the program runs"
                for i in ins:
                    pin(source[i], why)
                for o in outs:
                    result[o] = _fresh(value.shape[o], why)
            else:
                result[outs[0]] = DYNAMIC
            continue
        if len(outs) == 1:
            result[outs[0]] = _merge(axes, node, [source[i] for i in ins])
            continue
        for o in outs:
            result[o] = _fresh(value.shape[o])
        unify(product_of(*(source[i] for i in ins)), product_of(*(result[o] for o in outs)))
    return tuple(result)


def _reshape_as(axes: Axes, node: fx.Node) -> Dims:
    return tuple(_broadcast([_reshape(axes, node), axes.values[node.args[1]]]))


def _merge(axes: Axes, node: fx.Node, factors: list[Axis]) -> Axis:
    """Heads that were expanded to several copies and are numbered anew are linked to what they copy, for they may die one
    by one; everything else is a product."""
    if len(factors) == 2 and resolve(factors[0]) != ONE:
        copies = resolve(factors[1])
        expand = axes.copies.get(copies) if isinstance(copies, Atom) else None
        if expand is not None and _repeats_heads(expand, node):
            result = Atom(factors[0].size * copies.size)
            index = torch.arange(factors[0].size).repeat_interleave(copies.size)
            axes.links.append(Link(node, result, factors[0], index, copies))
            give_role(factors[0], "kv_head")
            return result
    return product_of(*factors)


def _repeats_heads(expand: fx.Node, node: fx.Node) -> bool:
    """Whether the reshape `node` of the expand of an unsqueeze does what repeat_interleave does, and nothing else."""
    unsqueeze = expand.args[0]
    if expand is not node.args[0] or len(expand.users) != 1 or unsqueeze.target is not aten.unsqueeze.default:
        return False
    before, between, after = (list(map(str, n.meta["val"].shape)) for n in (unsqueeze.args[0], expand, node))
    new = unsqueeze.args[1] % len(between)
    if not 0 < new < len(between) or between[:new] + between[new + 1 :] != before or len(after) != len(before):
        return False
    return after[: new - 1] + after[new:] == before[: new - 1] + before[new:]


def _repeat_interleave(axes: Axes, node: fx.Node) -> Dims:
    dims = list(axes.values[node.args[0]])
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if given is None or not isinstance(node.args[1], int) or dims[given] is DYNAMIC:
        return _pinned(_name(node))(axes, node)
    if dims[given] == ONE:
        dims[given] = _fresh(node.args[1])
        return tuple(dims)
    index = torch.arange(dims[given].size).repeat_interleave(node.args[1])
    result = Atom(len(index))
    axes.links.append(Link(node, result, dims[given], index))
    give_role(dims[given], "kv_head")
    dims[given] = result
    return tuple(dims)


def _index_select(axes: Axes, node: fx.Node) -> Dims:
    dims = list(axes.values[node.args[0]])
    d, index = node.args[1] % len(dims), node.args[2]
    constant = axes.program.constants.get(index.target) if index.op == "get_attr" else None
    if constant is None or constant.is_meta or dims[d] in (ONE, DYNAMIC) or not _only_selects(axes.program, index):
        pin(dims[d], "it is looked up by number")
        dims[d] = _fresh(node.meta["val"].shape[d], "it is looked up by number")
        return tuple(dims)
    result = Atom(len(constant)) if len(constant) > 1 else ONE
    if result is ONE:
        pin(dims[d], "one of it is looked up by number")
    else:
        axes.links.append(Link(node, result, dims[d], constant))
        unify(axes.values[index][0], result)
        give_role(dims[d], "kv_head")
    dims[d] = result
    return tuple(dims)


def _only_selects(program: Program, index: fx.Node) -> bool:
    """Whether a constant vector is nothing but a list of indices, which may be numbered anew."""
    users = users_of(program, index.target)
    return index.meta["val"].ndim == 1 and all(
        user.target is aten.index_select.default and index.target not in (user.args[0].target,) for user in users
    )


def _expand(axes: Axes, node: fx.Node) -> Dims:
    source, value = axes.values[node.args[0]], node.meta["val"]
    offset = value.ndim - len(source)
    dims = []
    for d, size in enumerate(value.shape):
        axis = source[d - offset] if d >= offset else ONE
        if axis == ONE and isinstance(size, int) and size > 1:
            axis = Atom(size)
            axes.copies[axis] = node
        dims.append(axis if axis != ONE else _fresh(size))
    return tuple(dims)


def _expand_as(axes: Axes, node: fx.Node) -> Dims:
    return tuple(_broadcast([axes.values[n] for n in node.args]))


def _slice(axes: Axes, node: fx.Node) -> Dims:
    source, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])[:5]
    dims = list(axes.values[source])
    d, size = dim % len(dims), source.meta["val"].shape[dim]
    wanted = node.meta["val"].shape[d]
    if not isinstance(size, int) or not isinstance(wanted, int) or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        pin(dims[d], "it is cut at a place known only when the program runs")
        dims[d] = _fresh(wanted, "it is cut at a place known only when the program runs")
        return tuple(dims)
    first = _clamp(start or 0, size)
    last = max(first, _clamp(size if end is None else end, size))
    try:
        if (step or 1) == 1:
            dims[d] = _piece(dims[d], first, last)
        else:
            if size % step or wanted != size // step:
                raise Mismatch
            dims[d], phase = split(dims[d], size // step)
            pin(phase, f"every {step}th of it is taken")
    except Mismatch:
        pin(dims[d], "it is cut within a part")
        dims[d] = _fresh(wanted, "it is cut within a part")
    return tuple(dims)


def _clamp(index: int, size: int) -> int:
    return min(max(index + size if index < 0 else index, 0), size)


def _piece(axis: Axis, first: int, last: int) -> Axis:
    if first == last:
        raise Mismatch
    if first:
        axis = cut(axis, first)[1]
    if last - first < axis.size:
        axis = cut(axis, last - first)[0]
    return ONE if axis.size == 1 else axis


def _split(axes: Axes, node: fx.Node) -> tuple[Dims, ...]:
    """split, split_with_sizes, chunk: pieces of one dimension."""
    value = node.meta["val"]
    dims = axes.values[node.args[0]]
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    d = given % len(dims)
    results, end = [], 0
    for part in value:
        size = part.shape[d]
        try:
            if not isinstance(size, int) or dims[d] is DYNAMIC:
                raise Mismatch
            end += size
            piece = _piece(dims[d], end - size, end)
        except Mismatch:
            pin(dims[d], "it is cut within a part")
            piece = _fresh(size, "it is cut within a part")
        if size == 1:
            pin(dims[d], "it is cut to single indices")
        results.append((*dims[:d], piece, *dims[d + 1 :]))
    return tuple(results)


def _unbind(axes: Axes, node: fx.Node) -> Any:
    """unbind, select: single indices of one dimension."""
    dims = list(axes.values[node.args[0]])
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    pin(dims.pop(given % len(dims)), "its indices are taken one by one")
    value = node.meta["val"]
    return tuple(dims) if isinstance(value, Tensor) else tuple(tuple(dims) for _ in value)


def _cat(axes: Axes, node: fx.Node) -> Dims:
    sources = [axes.values[n] for n in node.args[0]]
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    # An empty vector may be concatenated with anything.
    sources = [s for s, n in zip(sources, node.args[0]) if tuple(n.meta["val"].shape) != (0,)]
    d = given % len(sources[0])
    result = list(sources[0])
    for other in sources[1:]:
        for i, axis in enumerate(other):
            if i != d:
                result[i] = join(result[i], axis)
    parts = [s[d] for s in sources]
    if any(p is DYNAMIC for p in parts):
        for part in parts:
            pin(part, "it is joined to a dimension whose size is known only when the program runs")
        result[d] = DYNAMIC
    else:
        result[d] = sum_of([Atom(1, "a single index that others are joined to") if p == ONE else p for p in parts])
    return tuple(result)


def _stack(axes: Axes, node: fx.Node) -> Dims:
    result = _broadcast([axes.values[n] for n in node.args[0]])
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    value = node.meta["val"]
    result.insert(given % value.ndim, _fresh(len(node.args[0]), "it numbers what was stacked"))
    return tuple(result)


def _index(axes: Axes, node: fx.Node) -> Dims:
    """x[i, :, j]: dimensions that are looked up by number, at the place of the first where they are neighbours."""
    source, indices = axes.values[node.args[0]], list(node.args[1])
    looked_up = [d for d, i in enumerate(indices) if i is not None]
    for d in looked_up:
        pin(source[d], "it is looked up by number")
    rank = max(indices[d].meta["val"].ndim for d in looked_up)
    if any(indices[d].meta["val"].dtype == torch.bool for d in looked_up):
        return _pinned("it is chosen by a mask")(axes, node)
    for d in looked_up:
        for axis in axes.values[indices[d]]:
            pin(axis, "it is an index")
    others = [a for d, a in enumerate(source) if d not in looked_up]
    together = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    place = looked_up[0] if together else 0
    value = node.meta["val"]
    chosen = [_fresh(s, "it is looked up by number") for s in value.shape[place : place + rank]]
    return (*others[:place], *chosen, *others[place:])


def _pad(axes: Axes, node: fx.Node) -> Dims:
    dims, pads, value = list(axes.values[node.args[0]]), node.args[1], node.meta["val"]
    for i in range(0, len(pads), 2):
        d = len(dims) - 1 - i // 2
        if pads[i] != 0 or pads[i + 1] != 0:
            pin(dims[d], "it is padded")
            dims[d] = _fresh(value.shape[d], "it is padded")
    return tuple(dims)


def _repeat(axes: Axes, node: fx.Node) -> Dims:
    source, counts, value = axes.values[node.args[0]], node.args[1], node.meta["val"]
    offset = len(counts) - len(source)
    dims = []
    for d, count in enumerate(counts):
        if d >= offset and count == 1:
            dims.append(source[d - offset])
            continue
        if d >= offset:
            pin(source[d - offset], "it is repeated")
        dims.append(_fresh(value.shape[d], "it is repeated"))
    return tuple(dims)


def _getitem(axes: Axes, node: fx.Node) -> Dims:
    return axes.values[node.args[0]][node.args[1]]


def _rules(rule: Callable[[Axes, fx.Node], Any], *targets: Any) -> dict[Any, Callable[[Axes, fx.Node], Any]]:
    return dict.fromkeys(targets, rule)


_SOFTMAX = "it is normalised over by a softmax"
_SUMMED = "it is summed or averaged over"
_ORDERED = "the order of its indices matters"

RULES: dict[Any, Callable[[Axes, fx.Node], Any]] = {
    **{target: (lambda axes, node, spec=spec: _by_spec(axes, node, spec)) for target, spec in EINSUM.items()},
    **_rules(
        _like_first, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.type_as.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.dropout.default, aten.feature_dropout.default, aten.lift_fresh_copy.default,
    ),
    **_rules(
        _pointwise, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.__and__.Tensor,
        aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar, aten.floor_divide.default,
        aten.floor_divide.Scalar, aten.min.other, aten.max.other, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
        aten.relu6.default, aten.square.default, aten.clip.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.mish.default,
        aten.softplus.default, aten.hardswish.default, aten.hardsigmoid.default, aten.selu.default,
        aten.log_sigmoid.default,
    ),
    **_rules(
        _new, aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default,
        aten.new_full.default, aten.scalar_tensor.default,
    ),
    **_rules(_along(1, _SOFTMAX), aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
    **_rules(
        _along(1, _SUMMED), aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
        aten.var.dim, aten.std.correction, aten.std.dim, aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim,
        aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim,
    ),
    **_rules(_along(2, _SUMMED), aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim),
    **_rules(_along(1, _ORDERED), aten.cumsum.default, aten.cumprod.default, aten.flip.default),
    **_rules(_along(1, _ORDERED, -1), aten.sort.default, aten.argsort.default),
    **_rules(_along(2, _ORDERED, -1), aten.topk.default, aten.sort.stable),
    **_rules(_along(2, _ORDERED), aten.roll.default),
    **_rules(_normalised(1), aten.layer_norm.default, aten.rms_norm.default),
    **_rules(_group_norm, aten.group_norm.default),
    **_rules(_linear, aten.linear.default),
    **_rules(_batch_norm, aten.batch_norm.default, aten.instance_norm.default),
    **_rules(_prelu, aten.prelu.default),
    **_rules(_matmul, aten.matmul.default),
    **_rules(_addmm, aten.addmm.default, aten.baddbmm.default),
    **_rules(_einsum, aten.einsum.default),
    **_rules(_attention, aten.scaled_dot_product_attention.default),
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
    **_rules(
        _pool, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
        aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    ),
    **_rules(_permute, aten.permute.default),
    **_rules(_transpose, aten.transpose.int, aten.t.default),
    **_rules(_reverse, aten.numpy_T.default),
    **_rules(
        _reorder, aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default, aten.swapdims.default, aten.mT.default,
    ),
    **_rules(
        _reshape, aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    ),
    **_rules(_reshape_as, aten.reshape_as.default, aten.view_as.default),
    **_rules(_repeat_interleave, aten.repeat_interleave.self_int),
    **_rules(_index_select, aten.index_select.default),
    **_rules(_expand, aten.expand.default, aten.broadcast_to.default),
    **_rules(_expand_as, aten.expand_as.default),
    **_rules(_slice, aten.slice.Tensor),
    **_rules(_split, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes),
    **_rules(_unbind, aten.unbind.int, aten.select.int),
    **_rules(_cat, aten.cat.default, aten.concat.default),
    **_rules(_stack, aten.stack.default),
    **_rules(_index, aten.index.Tensor),
    **_rules(_pad, aten.pad.default, aten.constant_pad_nd.default),
    **_rules(_repeat, aten.repeat.default),
    **_rules(_pinned("its indices are places"), aten.arange.default, aten.arange.start, aten.arange.start_step),
    operator.getitem: _getitem,
}  # fmt: skip


def rule_of(target: Any) -> Callable[[Axes, fx.Node], Any] | None:
    if target in RULES:
        return RULES[target]
    is_pointwise = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1
    return _pointwise if is_pointwise else None
