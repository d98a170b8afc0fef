"""What lowering for the CPU puts into a graph: the operators fxc_cpu::*, over weights that oneDNN packs, or `native_*.pack`.

Run one by one they take weights that are packed already, go through the rows in blocks and finish each in place. For Inductor
they are the second functions of FUNCTIONS, which it traces into, fuses with what is around them, and whose weights freezing
packs.

Of linear layers x is [..., K] and the result [..., N] in x's dtype; weight is int8 [N, K], or what `pack_int8` made of it;
scale float32 [N] and zero_point zeros [N] are the weight's; bias [N] or None. dense: the weight in x's dtype, used instead
where there are up to `limit` rows (of int8_linear, int8_static_linear) or more than that (of split_linear), or None.
activation: "none" or one of `rows.ACTIVATIONS`, on the float32 result. An operator without a second function is not traced
into: what it calls writes, or has no form that Inductor compiles.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fxc_kernels.cpu.gelu import gelu
from fxc_kernels.cpu.int8_linear import int8_linear, int8_linear_compiled
from fxc_kernels.cpu.int8_static import conv2d_shape, max_pool2d, static_conv2d, static_linear, to_levels
from fxc_kernels.cpu.native_attention import native_attention
from fxc_kernels.cpu.native_between import add_layer_norm, add_rms_norm, layer_norm, rms_norm, rope, silu_mul
from fxc_kernels.cpu.native_int4 import native_int4_linear
from fxc_kernels.cpu.native_int8 import native_int8_linear
from fxc_kernels.cpu.native_rows import native_rows, widths
from fxc_kernels.cpu.packed_linear import dense_linear
from fxc_kernels.cpu.split_linear import split_linear, split_linear_compiled


def _define(name: str, schema: str, eager: Callable, compiled: Callable | None, fake: Callable) -> torch._ops.OpOverload:
    # Not torch.library.custom_op, and no rule for gradients: either costs 20 us a call, which small layers feel, and lowered
    # graphs run without gradients.
    torch.library.define(name, schema)
    torch.library.impl(name, "default", eager)
    torch.library.register_fake(name, fake)
    namespace, _, short = name.partition("::")
    found = getattr(getattr(torch.ops, namespace), short).default
    FUNCTIONS[found] = eager, compiled or found
    return found


FUNCTIONS: dict[torch._ops.OpOverload, tuple[Callable, Callable]] = {}
"""Operator -> the functions that take its place in a graph that is run node by node, which saves the dispatcher's 10 us a
call, and in one for Inductor."""


def _by_layout(packed: Callable, stored: Callable) -> Callable:
    return lambda x, weight, *rest: (packed if weight.is_mkldnn else stored)(x, weight, *rest)


def _fake_linear(x: Tensor, weight: Tensor, scale: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


_END = "Tensor? bias, str activation='none', Tensor? dense=None, int limit=0) -> Tensor"
INT8_LINEAR = _define(
    "fxc_cpu::int8_linear",
    f"(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor zero_point_term, {_END}",
    _by_layout(int8_linear, int8_linear_compiled),
    int8_linear_compiled,
    _fake_linear,
)
"""fxc::int8_linear. zero_point_term: what `int8_linear.zero_point_term` gives, float32 [1, N]."""

SPLIT_LINEAR = _define(
    "fxc_cpu::split_linear",
    f"(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, {_END}",
    _by_layout(split_linear, split_linear_compiled),
    split_linear_compiled,
    _fake_linear,
)
"""fxc::int8_weight_only_linear."""

NATIVE_INT8_LINEAR = _define(
    "fxc_cpu::native_int8_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor sums, Tensor? bias, int outputs, bool split, str activation='none', "
    "Tensor? dense=None, int limit=0) -> Tensor",
    native_int8_linear,
    None,
    lambda x, weight, scale, sums, bias, outputs, *rest: x.new_empty(*x.shape[:-1], outputs),
)
"""fxc::int8_linear, or with `split` fxc::int8_weight_only_linear, over what `native_int8.pack` gives."""

NATIVE_INT4_LINEAR = _define(
    "fxc_cpu::native_int4_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, int outputs, int group) -> Tensor",
    native_int4_linear,
    None,
    lambda x, weight, scale, zero, bias, outputs, group: x.new_empty(*x.shape[:-1], outputs),
)
"""fxc::int4_weight_only_linear over what `native_int4.pack` gives."""


def _fake_attention(query, key, value, *rest, **options):
    batch, heads, queries, depth = query.shape
    return query.new_empty(batch, queries, heads, depth).transpose(1, 2)


ATTENTION = _define(
    "fxc_cpu::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float? scale=None, bool enable_gqa=False) -> Tensor",
    native_attention,
    None,
    _fake_attention,
)
"""aten::scaled_dot_product_attention, with its arguments, see `native_attention`."""


def _fake_same(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_two(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_GAINS = "Tensor? weight, Tensor? bias, float eps"
RMS_NORM = _define("fxc_cpu::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, None, _fake_same)
ADD_RMS_NORM = _define(
    "fxc_cpu::add_rms_norm", "(Tensor x, Tensor other, Tensor weight, float eps) -> (Tensor, Tensor)", add_rms_norm, None,
    _fake_two,
)  # fmt: skip
LAYER_NORM = _define(
    "fxc_cpu::layer_norm", f"(Tensor x, Tensor? other, {_GAINS}) -> Tensor", layer_norm, None, _fake_same
)  # fmt: skip
ADD_LAYER_NORM = _define(
    "fxc_cpu::add_layer_norm", f"(Tensor x, Tensor other, {_GAINS}) -> (Tensor, Tensor)", add_layer_norm, None, _fake_two
)  # fmt: skip
ROPE = _define("fxc_cpu::rope", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", rope, None, _fake_same)
SILU_MUL = _define("fxc_cpu::silu_mul", "(Tensor gate, Tensor up) -> Tensor", silu_mul, None, _fake_same)

ROWS = _define(
    "fxc_cpu::rows",
    "(Tensor[] inputs, Tensor[] masks, Tensor?[] constants, float[] numbers, int[] steps, int[] results) -> Tensor[]",
    native_rows,
    None,
    lambda inputs, masks, constants, numbers, steps, results: [
        inputs[0].new_empty(*inputs[0].shape[:2], width) for width in widths(inputs, steps, results)
    ],
)
"""Layers of an encoder, see `native_rows`."""

_LEVELS = "ScalarType dtype, str activation='none', float? y_scale=None, int y_zero=0"


def _fake_static_linear(x, weight, scale, zero_point, bias, x_scale, x_zero, dtype, activation="none", y_scale=None, *rest):
    return x.new_empty(*x.shape[:-1], scale.shape[0], dtype=dtype if y_scale is None else torch.uint8)


STATIC_LINEAR = _define(
    "fxc_cpu::int8_static_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor? bias, float x_scale, int x_zero, "
    f"{_LEVELS}, Tensor? dense=None, int limit=0) -> Tensor",
    static_linear,
    static_linear,
    _fake_static_linear,
)
"""fxc::int8_static_linear, see `int8_static.static_linear`."""


def _fake_static_conv2d(
    x, weight, scale, zero_point, bias, kernel, stride, padding, dilation, groups, x_scale, x_zero, dtype, activation="none",
    y_scale=None, *rest,
):  # fmt: skip
    shape = conv2d_shape(x, scale, kernel, stride, padding, dilation)
    made = x.new_empty(shape, dtype=dtype if y_scale is None else torch.uint8)
    return made.contiguous(memory_format=torch.channels_last)


STATIC_CONV2D = _define(
    "fxc_cpu::int8_static_conv2d",
    "(Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor? bias, int[] kernel, int[] stride, int[] padding, "
    f"int[] dilation, int groups, float x_scale, int x_zero, {_LEVELS}, Tensor? other=None, float other_scale=1.0, "
    "int other_zero=0) -> Tensor",
    static_conv2d,
    None,
    _fake_static_conv2d,
)
"""fxc::int8_static_conv2d, see `int8_static.static_conv2d`."""

def _max_pool2d_compiled(x, kernel, stride, padding, dilation, ceil_mode):
    return torch.nn.functional.max_pool2d(x.float(), kernel, stride or None, padding, dilation, ceil_mode).to(x.dtype)


MAX_POOL2D = _define(
    "fxc_cpu::max_pool2d",
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    max_pool2d,
    _max_pool2d_compiled,
    _max_pool2d_compiled,
)
"""aten::max_pool2d of levels, uint8."""

TO_LEVELS = _define(
    "fxc_cpu::to_levels",
    "(Tensor x, float scale, int zero, Tensor? factor=None) -> Tensor",
    to_levels,
    to_levels,
    lambda x, scale, zero, factor=None: x.new_empty(x.shape, dtype=torch.uint8),
)
"""Numbers as levels, uint8, see `int8_static.to_levels`."""

DENSE_LINEAR = _define(
    "fxc_cpu::dense_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    dense_linear,
    dense_linear,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
"""aten::linear over a weight that `pack_bfloat16` may have packed."""

GELU = _define(
    "fxc_cpu::gelu",
    '(Tensor x, *, str approximate="none") -> Tensor',
    gelu,
    gelu,
    lambda x, approximate="none": x.new_empty(x.shape),
)
"""aten::gelu, for a compiler."""
