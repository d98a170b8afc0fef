"""Products of matrices: linear layers, those of experts, and products of two values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxc.analysis.axis import ONE, Axis, give_role, pin
from fxc.analysis.constants import (
    AT_ONCE,
    Known,
    State,
    constant_along,
    either,
    finite,
    is_read,
    uniform,
    unread,
    vanishes,
    widened,
)
from fxc.analysis.dims import Axes, Dims, Site, broadcast, by_spec, join, pinned
from fxc.analysis.operators.table import Dead, register
from fxc.ir.call import Call
from fxc.mapped import pieces
from fxc.schemes import ops

aten = torch.ops.aten
_EXPERTS = {"expert": "experts are chosen by number"}
COMPUTED = "it reads constants, and its weight or bias is computed while the model runs"


# ---------------------------------------------------------------------------------------------------------------- linear


def _axes_of_linear(axes: Axes, call: Call) -> Dims:
    if len(axes.values[call["weight"]]) != 2:
        return pinned(axes, call, f"{call.name} with a vector")
    return by_spec(axes, call, "... i, o i, o -> ... o")


def _known_of_linear(state: State, call: Call) -> Known | None:
    weight, bias = state.get(call["weight"]), state.get(call["bias"])
    if weight is None or not weight.is_complete or (call["bias"] is not None and bias is None) or weight.values.ndim != 2:
        return None
    matrix = weight.values.expand(call.shape_of("weight"))
    known, lead = state.get(call["input"]), (1,) * (call.rank - 1)
    if known is None:
        result = ~is_read(matrix, (1,))
        values = torch.zeros(matrix.shape[0], dtype=matrix.dtype)
        values, result = values.reshape(*lead, -1), result.reshape(*lead, -1)
    else:
        known = widened(known, -1, matrix.shape[1])
        unknown, there = (~known.mask).to(torch.float32), torch.where(known.mask, known.values, 0).double()
        results = [unknown @ (piece != 0).to(torch.float32).t() == 0 for piece in pieces(matrix, AT_ONCE)]
        products = [(there @ piece.double().t()).to(matrix.dtype) for piece in pieces(matrix, AT_ONCE)]
        result, values = torch.cat(results, -1), torch.cat(products, -1)
    if bias is not None:
        values, result = values + bias.values, result & bias.mask
    return finite(values, result, len(lead) + 1)


def is_computed(call: Call) -> bool:
    """Whether the weight or the bias is not a constant, to which something could be added."""
    bias = call["bias"]
    return call["weight"].op != "get_attr" or not (bias is None or bias.op == "get_attr")


def _dead_of_linear(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    size = site.axis.size
    mask, values = constant_along(known.get(call["input"]), -1, size)
    if (weight := known.get(call["weight"])) is None or not weight.is_complete:
        return Dead(mask & (values == 0))
    skipped = unread(call["weight"], known, size, (0,))
    if not bool((mask & ~skipped & (values != 0)).any()):
        return Dead(skipped | mask)
    if is_computed(call):
        return Dead(skipped | (mask & (values == 0)), kept=COMPUTED)
    return Dead(skipped | mask, fold=torch.where(skipped, 0, values))


def _fold_into_linear(weight: Tensor, gone: Tensor) -> Tensor:
    return weight.double() @ gone


register(
    aten.linear.default, axes=_axes_of_linear, known=_known_of_linear, dead=_dead_of_linear, fold=_fold_into_linear
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- experts


def _axes_of_experts(axes: Axes, call: Call) -> Dims:
    return by_spec(axes, call, "t k, !expert n k, !expert -> t n", _EXPERTS)


def _axes_of_experts_transposed(axes: Axes, call: Call) -> Dims:
    return by_spec(axes, call, "t k, !expert k n, !expert -> t n", _EXPERTS)


def _known_of_experts(state: State, call: Call) -> Known | None:
    weight, known = state.get(call["weight"]), state.get(call["x"])
    if weight is None or not weight.is_complete:
        return None
    matrices = weight.values
    if known is None:
        result = ~matrices.any(dim=2).any(dim=0)
        return Known(torch.zeros(1, matrices.shape[1], dtype=matrices.dtype), result[None])
    known = widened(uniform(known, [0]), -1, matrices.shape[2])
    unknown = (~known.mask).to(torch.float32)
    result = (unknown @ (matrices != 0).to(torch.float32).transpose(1, 2) == 0).all(0)
    values = (torch.where(known.mask, known.values, 0).double() @ matrices.double().transpose(1, 2)).to(matrices.dtype)
    # Which expert a token goes to is not known: they have to agree.
    return Known(values[0], result & (values == values[:1]).all(0))


def _dead_of_experts(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    """Experts have no bias, so that only zeros go."""
    mask, values = constant_along(known.get(call["x"]), -1, site.axis.size)
    return Dead(unread(call["weight"], known, site.axis.size, (0, 1)) | (mask & (values == 0)))


register(ops.GROUPED_LINEAR, axes=_axes_of_experts, known=_known_of_experts, dead=_dead_of_experts)
register(ops.GROUPED_MM, axes=_axes_of_experts_transposed)


# ---------------------------------------------------------------------------------------------------------- two values


def _axes_of_matmul(axes: Axes, call: Call) -> Dims:
    a, b = (axes.values[call[i]] for i in (0, 1))
    if min(len(a), len(b)) < 2:
        return pinned(axes, call, f"{call.name} of a vector")
    batch = broadcast([a[:-2], b[:-2]])
    inner = join(a[-1], b[-2])
    axes.sites.append(Site(call.node, inner, ((0, len(a) - 1), (1, len(b) - 2))))
    if batch and not any(call[i].op == "get_attr" for i in (0, 1)):
        give_role(batch[-1], "head")
        for axis in (a[-2], inner, b[-1]):
            give_role(axis, "head_dim")
    return (*batch, a[-2], b[-1])


def _known_of_matmul(state: State, call: Call) -> Known | None:
    """It is zero in the rows where the first operand is and in the columns where the second is."""
    if min(len(call.shape_of(i)) for i in (0, 1)) < 2:
        return None
    a, b = state.get(call[0]), state.get(call[1])
    mask = torch.zeros((), dtype=torch.bool)
    if a is not None:
        mask = mask | a.zeros().all(-1, keepdim=True)
    if b is not None:
        mask = mask | b.zeros().all(-2, keepdim=True)
    return None if not mask.any() else finite(torch.zeros(mask.shape, dtype=call.value.dtype), mask, call.rank)


def _dead_of_matmul(site: Site, call: Call, known: Mapping[fx.Node, Known]) -> Dead:
    return Dead(either(site.axis.size, vanishes(call[0], -1, known), vanishes(call[1], -2, known)))


def _axes_of_addmm(axes: Axes, call: Call) -> Dims:
    bias, a, b = (axes.values[call[i]] for i in (0, 1, 2))
    inner = join(a[-1], b[-2])
    axes.sites.append(Site(call.node, inner, ((1, len(a) - 1), (2, len(b) - 2))))
    return tuple(broadcast([[*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]], bias]))


def _axes_of_einsum(axes: Axes, call: Call) -> Dims:
    equation = call["equation"]
    if "." in equation or "->" not in equation:
        return pinned(axes, call, call.name)
    left, result = equation.replace(" ", "").split("->")
    letters: dict[str, Axis] = {}
    for names, operand in zip(left.split(","), call["tensors"], strict=True):
        for dimension, letter in enumerate(names):
            letters[letter] = join(letters.get(letter, ONE), axes.values[operand][dimension])
    for letter, axis in letters.items():
        if letter not in result:
            pin(axis, "it is summed over by einsum")
    return tuple(letters[letter] for letter in result)


def _of_spec(spec: str):
    return lambda axes, call: by_spec(axes, call, spec)


register(aten.matmul.default, axes=_axes_of_matmul, known=_known_of_matmul, dead=_dead_of_matmul)
register(aten.mm.default, axes=_of_spec("m k, k n -> m n"), known=_known_of_matmul, dead=_dead_of_matmul)
register(aten.bmm.default, axes=_of_spec("b m k, b k n -> b m n"), known=_known_of_matmul, dead=_dead_of_matmul)
register(aten.addmm.default, aten.baddbmm.default, axes=_axes_of_addmm)
register(aten.einsum.default, axes=_axes_of_einsum)
