"""The forms in which a CPU can run a layer with packed weights. A further form is one more entry of CANDIDATES."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.program import Program
from fxc.lower.siblings import Place, Siblings
from fxc.schemes import int4, int8
from fxc.schemes.scheme import product_of, scheme_of
from fxc_kernels.cpu import int8_linear, int8_product, native_int4, native_int8
from fxc_kernels.cpu.int8_static import POST_OPS, reach, to_levels
from fxc_kernels.cpu.ops import (
    DENSE_LINEAR,
    INT8_LINEAR,
    NATIVE_INT4_LINEAR,
    NATIVE_INT8_LINEAR,
    SPLIT_LINEAR,
    STATIC_LINEAR,
)
from fxc_kernels.cpu.packed_linear import dense_linear, packed_where_it_helps
from fxc_kernels.cpu.rows import ACTIVATIONS
from fxc_kernels.cpu.split_linear import symmetric_scales
from fxc_kernels.int4_linear import unpack
from fxc_kernels.int8_linear import INT32_COLUMNS, quantize_rows

# int4 weights run as int8 ones when that makes the error of int4 larger by no more than this. Rows without outliers: 0.3 %.
INT4_AS_INT8 = 0.02
_INT4 = {scheme.products[0].operator: bits for bits, scheme in int4.SCHEMES.items()}

SATURATE = "oneDNN's int8 products saturate on this CPU, which has no VNNI"

Trial = Callable[[Tensor, bool], Callable[[], object]]
"""(x [M, K], whether what surrounds the product counts too) -> the call to be timed."""


@dataclass(frozen=True)
class CpuPlace(Place):
    """packed: weights as oneDNN has them, or as they are stored, for Inductor, whose freezing packs them; activation: what is
    applied to the result, "none" or one of `fxc_kernels.cpu.rows.ACTIVATIONS`, for a candidate that absorbs one."""

    packed: bool = True
    activation: str = "none"


@dataclass(frozen=True)
class Candidate:
    """One form of the layers of a group.

    name: in reports; timed_as: in measurements; kind: what these are remembered under; targets: the operators whose layers it
    runs; rows: the row counts at which it is timed; wins_for: "many" rows or "few", where it may be faster than float is;
    why_not: why it cannot run a group, None where it can; note: what a report says besides; trial: (int8 [N, K], scale [N],
    dtype) -> a layer to be timed; make: writes the layer into a program, with the weight in floats too for the row counts on
    the other side of `limit` unless `dense` is None; absorbs: the activations behind it that it takes; is_one_call: whether a
    compiler sees one call instead of what it is made of, and fuses nothing with it; stays_packed: whether the weights keep
    the few bits that they are stored in: such a form is taken where it is faster than float, without a float copy beside it;
    bits: those that it holds a number of the weight in, None for the layer's dtype.
    """

    name: str
    timed_as: str
    kind: str
    targets: tuple[object, ...]
    rows: tuple[int, ...]
    wins_for: str
    why_not: Callable[[Siblings], str | None]
    note: Callable[[Siblings], str]
    trial: Callable[[Tensor, Tensor, torch.dtype], Trial]
    make: Callable[[CpuPlace, Siblings, Tensor | None, int], fx.Node]
    absorbs: Collection[str] = ()
    is_one_call: bool = False
    stays_packed: bool = False
    bits: int | None = 8


def candidates(group: Siblings) -> tuple[Candidate, ...]:
    """The forms that the layers of `group` may have, whether this machine runs them or not. The last is float, which all do."""
    return (*(each for each in CANDIDATES if group.target in each.targets), FLOAT)


def held_bytes(form: Candidate, group: Siblings, with_float: bool = False) -> int:
    """What the layers of `group` hold in `form`, and with a float copy beside it. Scales and sums of each output are counted as
    the most that any form has."""
    outputs = sum(group.sizes)
    dense = (outputs * group.columns + (0 if group.bias is None else outputs)) * group.dtype.itemsize
    if form.bits is None:
        return dense
    panels = -(-outputs // native_int8.PANEL) * native_int8.PANEL * group.columns * form.bits // 8
    beside = sum(each.nbytes for arguments in group.arguments for each in arguments[2:] if isinstance(each, Tensor))
    return panels + beside + 8 * outputs + (dense if with_float else 0)


def rounded_to_int8(weight: Tensor, int4_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """float32 int4 weight [N, K], its scales [N, groups] -> (int8 [N, K], scale float32 [N], by what factor the error of int4
    grows, minus 1, judged by steps: rounding errors are as large as they are). Each group counts alike, however small its
    weights, because what they meet may be large; so weights of very different groups are judged worse than they are."""
    scale = symmetric_scales(weight)
    ratio = (scale / int4_scale.float().abs())[(weight != 0).any(dim=1)]
    more = (1 + ratio.square().sum() / max(ratio.numel(), 1)).sqrt() - 1
    return (weight / scale).round_().to(torch.int8), scale.flatten(), more.item()


# Int8 products


def why_no_onednn_int8() -> str | None:
    """Why oneDNN's int8 products cannot be used on this machine, or None."""
    if not torch.backends.mkldnn.is_available():
        return "there is no oneDNN in torch"
    return None if int8_product.int8_is_exact() else "oneDNN's int8 products are not exact on this CPU"


def _why_no_int8(group: Siblings) -> str | None:
    if why := why_no_onednn_int8():
        return why
    if group.dtype not in (torch.float32, torch.bfloat16):
        return f"no int8 product takes {group.dtype} to {group.dtype} on a CPU"
    if group.target in _INT4 and _stays_int4(group):
        return "its weights stay four bits"
    if group.target in _INT4 and not (more := _int8_weight(group)[2]) <= INT4_AS_INT8:
        return f"as int8 the error of {scheme_of(group.target).label} would be {more:.1%} larger, by steps"
    return None


def _why_no_static(group: Siblings) -> str | None:
    return SATURATE if int8_product.products_saturate() else _why_no_int8(group)


def _stays_int4(group: Siblings) -> bool:
    """Whether a form with the weights as they are is all that is asked for: without AMX an int8 one is not faster, and to find
    out what it would cost expands the weight to floats."""
    return _why_no_native_int4(group) is None and not torch.cpu._is_amx_tile_supported()


def _rounding(group: Siblings) -> str:
    if group.target not in _INT4:
        return ""
    more, label = _int8_weight(group)[2], scheme_of(group.target).label
    return f"; {label} weights rounded once more, to int8: the error of {label} is {more:.1%} larger, by steps"


def _int8_weight(group: Siblings) -> tuple[Tensor, Tensor, float]:
    """(int8 [N, K], scale [N], by how much the error grows) of the group's layers: their own, or int4 ones rounded again."""
    if "int8" not in group.kept:
        is_int4 = group.target in _INT4
        scale = group.argument(2)
        group.kept["int8"] = rounded_to_int8(group.dense(torch.float32), scale) if is_int4 else (group.argument(1), scale, 0.0)
    return group.kept["int8"]


def _int8_trial(weight_only: bool, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Trial:
    weight, zero_point = int8_product.pack_int8(qweight), torch.zeros(len(scale), dtype=torch.int32)
    term = () if weight_only else (int8_linear.zero_point_term(qweight, scale),)
    operator = SPLIT_LINEAR if weight_only else INT8_LINEAR

    def call_on(x: Tensor, whole: bool) -> Callable[[], object]:
        if whole:
            return functools.partial(operator, x, weight, scale, zero_point, *term, None)
        q = int8_product.to_uint8(quantize_rows(torch.cat([x, x]) if weight_only else x)[0])
        return functools.partial(int8_product.int8_product, q, weight, scale, zero_point)

    return call_on


def _make_int8(operator: object, place: CpuPlace, group: Siblings, dense: Tensor | None, limit: int) -> fx.Node:
    qweight, scale, _ = _int8_weight(group)
    weight = place.constant("weight", int8_product.pack_int8(qweight) if place.packed else qweight)
    args = [group.x, weight, place.constant("scale", scale)]
    args.append(place.constant("zero_point", torch.zeros(len(scale), dtype=torch.int32)))
    if operator is INT8_LINEAR:
        args.append(place.constant("zero_point_term", int8_linear.zero_point_term(qweight, scale)))
    args.append(place.constant("bias", group.bias))
    if dense is not None:
        args += [place.activation, place.constant("dense", dense), limit]
    elif place.activation != "none":
        args.append(place.activation)
    return place.call(operator, tuple(args), group)


# Int8 in one call


def _why_no_native_int8(group: Siblings) -> str | None:
    if group.dtype not in (torch.float32, torch.bfloat16):
        return f"no int8 product takes {group.dtype} to {group.dtype} on a CPU"
    if group.columns > INT32_COLUMNS:
        return f"sums of {group.columns} products do not fit into 32 bits"
    return native_int8.why_not()


def _native_int8_trial(split: bool, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Trial:
    layer = native_int8.pack(qweight, scale, None)
    return lambda x, whole: functools.partial(NATIVE_INT8_LINEAR, x, *layer, len(scale), split)


def _make_native_int8(split: bool, place: CpuPlace, group: Siblings, dense: Tensor | None, limit: int) -> fx.Node:
    made = native_int8.pack(group.argument(1), group.argument(2), group.bias)
    constants = [place.constant(part, each) for part, each in zip(("weight", "scale", "sums", "bias"), made, strict=True)]
    args = [group.x, *constants, sum(group.sizes), split]
    if dense is not None:
        args += [place.activation, place.constant("dense", dense), limit]
    elif place.activation != "none":
        args.append(place.activation)
    return place.call(NATIVE_INT8_LINEAR, tuple(args), group)


# Int4 in one call


def _why_no_native_int4(group: Siblings) -> str | None:
    if group.dtype not in (torch.float32, torch.bfloat16):
        return f"no int4 product takes {group.dtype} on a CPU"
    return native_int4.why_not()


def _native_int4_trial(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Trial:
    rows, columns = qweight.shape
    group = 32 if columns % native_int4.RUN else native_int4.RUN
    scale = scale[:, None].expand(-1, columns // group).to(dtype)
    weight, scale, _ = native_int4.pack(lambda rows: qweight[rows].view(torch.uint8) & 15, 4, scale, None)
    return lambda x, whole: functools.partial(NATIVE_INT4_LINEAR, x, weight, scale, None, None, rows, group)


def _make_native_int4(place: CpuPlace, group: Siblings, dense: Tensor | None, limit: int) -> fx.Node:
    bits = _INT4[group.target]
    qweight, scale, zero = group.argument(1), group.argument(2), group.argument(3)
    made = native_int4.pack(lambda rows: unpack(qweight[rows], bits), bits, scale, zero)
    constants = [place.constant(part, each) for part, each in zip(("weight", "scale", "zero"), made, strict=True)]
    args = (group.x, *constants, place.constant("bias", group.bias), sum(group.sizes), group.columns // scale.shape[1])
    return place.call(NATIVE_INT4_LINEAR, args, group)


# Int8 products by a scale from data


def _static_trial(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Trial:
    weight, zero_point = int8_product.pack_int8(qweight), torch.zeros(len(scale), dtype=torch.int32)
    learned = tuple(product_of(int8.STATIC).learned.values())

    def call_on(x: Tensor, whole: bool) -> Callable[[], object]:
        return functools.partial(
            STATIC_LINEAR, x if whole else to_levels(x, *learned), weight, scale, zero_point, None, *learned, dtype
        )

    return call_on


def _make_static(place: CpuPlace, group: Siblings, dense: Tensor | None, limit: int) -> fx.Node:
    qweight, scale = group.argument(1), group.argument(2)
    args = [group.x, place.constant("weight", int8_product.pack_int8(qweight) if place.packed else qweight)]
    args.append(place.constant("scale", scale))
    args.append(place.constant("zero_point", torch.zeros(len(scale), dtype=torch.int32)))
    args += [place.constant("bias", group.bias), *group.arguments[0][4:6], group.dtype, place.activation, None, 0]
    if dense is not None:
        args += [place.constant("dense", dense), limit]
    return place.call(STATIC_LINEAR, tuple(args), group)


# Float


def within_reach(program: Program, x: fx.Node, scale: float, zero: int, before: fx.Node) -> fx.Node:
    """x where a scale from data ends, as the operator has it: rounding may be left out, and what is beyond may not."""
    how = {"before": before, "by": "lower", "fqn": before.meta.get("fqn", "")}
    return edit.insert(program, torch.ops.aten.clamp.default, (x, *reach(scale, zero)), **how)


def _float_trial(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Trial:
    weight = packed_where_it_helps((qweight.float() * scale[:, None]).to(dtype))
    return lambda x, whole: functools.partial(dense_linear, x, weight, None)


def float_weight(group: Siblings, packed: bool) -> Tensor:
    """The weights of the group's layers [N, K] in the dtype that they are used in."""
    weight = group.dense(group.dtype)
    return packed_where_it_helps(weight) if packed else weight


def _make_float(place: CpuPlace, group: Siblings, dense: Tensor | None, limit: int) -> fx.Node:
    bias = None if group.bias is None else group.bias.to(group.dtype)
    weight = float_weight(group, place.packed)
    target = DENSE_LINEAR if weight.is_mkldnn else torch.ops.aten.linear.default
    x = group.x
    if group.target is int8.STATIC:
        x = within_reach(place.program, x, *group.arguments[0][4:6], group.nodes[0])
    return place.call(target, (x, place.constant("weight", weight), place.constant("bias", bias)), group)


def _native_int8(split: bool, kind: str, target: object, rows: tuple[int, ...], wins_for: str) -> Candidate:
    return Candidate(
        name="int8",
        timed_as="native int8",
        kind=kind,
        targets=(target,),
        rows=rows,
        wins_for=wins_for,
        why_not=_why_no_native_int8,
        note=lambda group: "",
        trial=functools.partial(_native_int8_trial, split),
        make=functools.partial(_make_native_int8, split),
        absorbs=native_int8.ACTIVATIONS,
        is_one_call=True,
    )


# One token, a few sequences decoding together, a prompt, a batch of them.
NATIVE_INT8 = _native_int8(False, "native int8", int8.LINEAR, (1, 16, 128, 256), "many")
"""Activations quantized as they come, product and all around it in one call."""

NATIVE_SPLIT = _native_int8(True, "native weight-only", int8.WEIGHT_ONLY, (1, 8, 32, 128, 256), "few")
"""Activations kept, as two int8 products, in one call."""

NATIVE_INT4 = Candidate(
    name="int4",
    timed_as="native int4",
    kind="native int4",
    targets=tuple(_INT4),
    rows=(1, 8, 32, 128, 256),
    wins_for="few",
    why_not=_why_no_native_int4,
    note=lambda group: "",
    trial=_native_int4_trial,
    make=_make_native_int4,
    is_one_call=True,
    stays_packed=True,
    bits=4,
)
"""Weights of four bits as they are, activations rounded to int8 by runs."""

INT8 = Candidate(
    name="int8",
    timed_as="int8",
    kind="int8",
    targets=(int8.LINEAR,),
    rows=(1, 16, 128, 256),
    wins_for="many",
    why_not=_why_no_int8,
    note=_rounding,
    trial=functools.partial(_int8_trial, False),
    make=functools.partial(_make_int8, INT8_LINEAR),
    absorbs=tuple(ACTIVATIONS),
)
"""Activations quantized as they come."""

SPLIT = Candidate(
    name="int8",
    timed_as="int8",
    kind="weight-only",
    targets=(int8.WEIGHT_ONLY, *_INT4),
    rows=(1, 8, 32, 128, 256),  # twice as many in the product: beside a bfloat16 one it wins for few
    wins_for="few",
    why_not=_why_no_int8,
    note=_rounding,
    trial=functools.partial(_int8_trial, True),
    make=functools.partial(_make_int8, SPLIT_LINEAR),
)
"""Activations kept, as two int8 products."""

STATIC = Candidate(
    name="int8",
    timed_as="int8",
    kind="static",
    targets=(int8.STATIC,),
    rows=(1, 16, 128, 256),
    wins_for="many",
    why_not=_why_no_static,
    note=_rounding,
    trial=_static_trial,
    make=_make_static,
    absorbs=tuple(POST_OPS),
)
"""Activations rounded by a scale from data."""

CANDIDATES = (NATIVE_INT8, NATIVE_SPLIT, NATIVE_INT4, INT8, SPLIT, STATIC)

FLOAT = Candidate(
    name="dequantized",
    timed_as="float",
    kind="float",
    targets=(),
    rows=(),
    wins_for="many",
    why_not=lambda group: None,
    note=lambda group: "",
    trial=_float_trial,
    make=_make_float,
    bits=None,
)
"""The weights as numbers, once."""
