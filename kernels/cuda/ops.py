"""What lowering for CUDA puts into a graph: the operators fxc_cuda::*, each a Triton kernel with its neighbours fused.

On CUDA, and in Triton's interpreter (TRITON_INTERPRET=1), they launch kernels. On the CPU they compute what the kernels mean in
plain torch, so that a lowered graph can be checked on any machine. All of them are functional, and know the shapes of what they
give without running: torch.compile and CUDA graphs take them.

A quantized activation is q [..., K] with one scale and, for int8, one zero point a row: [...].
activation: "none", "gelu", "gelu_tanh", "silu", or "silu_mul", for a weight with rows of gate and up in turns.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear
from fxc_kernels.cuda.interleaved import silu_mul
from fxc_kernels.cuda.sparse24_prepacked import Prepacked, unpack
from fxc_kernels.no_gradient import operator

_ACTIVATIONS = {
    "none": lambda product: product,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda product: torch.nn.functional.gelu(product, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "silu_mul": silu_mul,
}


def launches(x: Tensor) -> bool:
    """Whether operators on x run Triton kernels."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _shape(x: Tensor, outputs: int, activation: str) -> tuple[int, ...]:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(_ACTIVATIONS)}")
    return (*x.shape[:-1], outputs // 2 if activation == "silu_mul" else outputs)


def _finished(product: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """float32 product + bias, the activation, and only then `dtype`."""
    return _ACTIVATIONS[activation](product if bias is None else product + bias.float()).to(dtype)


# Activations to int8 or float8_e4m3fn, row by row.


@operator("fxc_cuda::quantize_int8")
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] -> (q int8 [..., K], scale float32 [...], zero point int32 [...])."""
    if launches(x):
        from fxc_kernels.cuda.quantize_rows import quantize_rows
    else:
        quantize_rows = int8_linear.quantize_rows
    q, scale, zero = quantize_rows(x.reshape(-1, x.shape[-1]))
    return q.view(x.shape), scale.view(x.shape[:-1]), zero.view(x.shape[:-1])


@operator("fxc_cuda::quantize_fp8")
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (q float8_e4m3fn [..., K], scale float32 [...])."""
    rows = x.reshape(-1, x.shape[-1])
    if launches(x):
        from fxc_kernels.cuda.quantize_rows import quantize_rows

        q, scale, _ = quantize_rows(rows, torch.float8_e4m3fn)
    else:
        q, scale = fp8_linear.quantize_rows(rows)
    return q.view(x.shape), scale.view(x.shape[:-1])


@operator("fxc_cuda::rms_norm_int8")
def rms_norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_int8` of the norm of x [..., K] as Llama computes it, weight [K]."""
    q, scale, zero, _ = _norm(x, None, weight, eps, torch.int8)
    return q, scale, zero


@operator("fxc_cuda::add_rms_norm_int8")
def add_rms_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_int8` of x + residual, and that sum in x's dtype."""
    return _norm(x, residual, weight, eps, torch.int8)


@operator("fxc_cuda::rms_norm_fp8")
def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` of the norm of x [..., K] as Llama computes it, weight [K]."""
    q, scale, _, _ = _norm(x, None, weight, eps, torch.float8_e4m3fn)
    return q, scale


@operator("fxc_cuda::add_rms_norm_fp8")
def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_fp8` of x + residual, and that sum in x's dtype."""
    q, scale, _, total = _norm(x, residual, weight, eps, torch.float8_e4m3fn)
    return q, scale, total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    """(q, scale, zero or None, x + residual)."""
    if launches(x):
        from fxc_kernels.cuda.norm_quantize import rms_norm_quantize

        q, scale, zero, total = rms_norm_quantize(x, weight, eps, residual, dtype)
    else:
        normed, total = _float_norm(x, residual, weight, eps)
        rows = normed.reshape(-1, x.shape[-1])
        q, scale, zero = int8_linear.quantize_rows(rows) if dtype == torch.int8 else (*fp8_linear.quantize_rows(rows), None)
    row = x.shape[:-1]
    return q.view(x.shape), scale.view(row), None if zero is None else zero.view(row), total


def _float_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, that sum)."""
    if launches(x):
        from fxc_kernels.cuda.rms_norm import rms_norm as norm

        return norm(x, weight, eps, residual)
    from fxc_kernels.cuda.norm_quantize import rms_norm_reference

    return rms_norm_reference(x, weight, eps, residual)


@quantize_int8.register_fake
def _(x):
    return _fake_int8(x)


@quantize_fp8.register_fake
def _(x):
    return _fake_fp8(x)


@rms_norm_int8.register_fake
def _(x, weight, eps):
    return _fake_int8(x)


@rms_norm_fp8.register_fake
def _(x, weight, eps):
    return _fake_fp8(x)


@add_rms_norm_int8.register_fake
def _(x, residual, weight, eps):
    return (*_fake_int8(x), x.new_empty(x.shape))


@add_rms_norm_fp8.register_fake
def _(x, residual, weight, eps):
    return (*_fake_fp8(x), x.new_empty(x.shape))


def _fake_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8), x.new_empty(row, dtype=torch.float32), x.new_empty(row, dtype=torch.int32)
    )  # fmt: skip


def _fake_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


# What else a decoder layer is made of, where activations stay floats.


@operator("fxc_cuda::rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of x [..., K] as Llama computes it, weight [K]."""
    return _float_norm(x, None, weight, eps)[0]


@operator("fxc_cuda::add_rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x + residual, that sum)."""
    return _float_norm(x, residual, weight, eps)


@operator("fxc_cuda::rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], cos and sin [B or 1, 1, S, D] -> x * cos + rotate_half(x) * sin, contiguous."""
    from fxc_kernels.cuda import rope as cuda_rope

    return cuda_rope.rope(x, cos, sin) if launches(x) else cuda_rope.rope_reference(x, cos, sin).contiguous()


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape)


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@rope.register_fake
def _(x, cos, sin):
    return x.new_empty(x.shape)


# Products of quantized activations.


@operator("fxc_cuda::int8_mm")
def int8_mm(
    q: Tensor, row_scale: Tensor, zero: Tensor, qweight: Tensor, scale: Tensor, column_sum: Tensor, bias: Tensor | None,
    dtype: torch.dtype, activation: str,
) -> Tensor:  # fmt: skip
    """q from `quantize_int8`, qweight int8 [N, K], scale float32 [N], column_sum int32 [N]: the sums of qweight's rows ->
    `fxc::int8_linear` in `dtype`, then the activation."""
    shape = _shape(q, qweight.shape[0], activation)
    rows = q.reshape(-1, q.shape[-1])
    row_scale, zero = row_scale.reshape(-1), zero.reshape(-1)
    if launches(q):
        from fxc_kernels.cuda.scaled_mm import scaled_mm

        out = scaled_mm(
            rows, row_scale, zero, qweight, scale, bias, column_sum=column_sum, dtype=dtype, activation=activation
        )
    else:
        product = (rows.double() @ qweight.double().t() - zero[:, None] * column_sum.double()).float()
        out = _finished(product * scale * row_scale[:, None], bias, activation, dtype)
    return out.view(shape)


@operator("fxc_cuda::fp8_mm")
def fp8_mm(
    q: Tensor, row_scale: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str
) -> Tensor:
    """q from `quantize_fp8`, qweight float8_e4m3fn [N, K], scale float32 [N] -> `fxc::fp8_linear` in `dtype`, then the
    activation."""
    shape = _shape(q, qweight.shape[0], activation)
    rows, row_scale = q.reshape(-1, q.shape[-1]), row_scale.reshape(-1)
    if launches(q):
        from fxc_kernels.cuda.scaled_mm import scaled_mm

        out = scaled_mm(rows, row_scale, None, qweight, scale, bias, dtype=dtype, activation=activation)
    else:
        product = (rows.float() @ qweight.float().t()) * scale * row_scale[:, None]
        out = _finished(product, bias, activation, dtype)
    return out.view(shape)


@operator("fxc_cuda::int8_sparse24_mm")
def int8_sparse24_mm(
    q: Tensor, row_scale: Tensor, zero: Tensor, values: Tensor, meta: Tensor, outputs: int, scale: Tensor, column_sum: Tensor,
    bias: Tensor | None, dtype: torch.dtype, activation: str,
) -> Tensor:  # fmt: skip
    """`int8_mm` with the 2:4 weight [outputs, K] whose values and meta `fxc_kernels.cuda.sparse24_prepacked.prepack` made."""
    weight = Prepacked(values, meta, outputs, q.shape[-1])
    if not launches(q):
        return int8_mm(
            q, row_scale, zero, sparse24_linear.unpack(*unpack(weight)), scale, column_sum, bias, dtype, activation
        )
    from fxc_kernels.cuda.sparse24_prepacked_linear import prepacked_scaled_mm

    out = prepacked_scaled_mm(
        q.reshape(-1, q.shape[-1]), row_scale.reshape(-1), zero.reshape(-1), weight, scale, bias,
        column_sum=column_sum, dtype=dtype, activation=activation,
    )  # fmt: skip
    return out.view(_shape(q, outputs, activation))


@int8_sparse24_mm.register_fake
def _(q, row_scale, zero, values, meta, outputs, scale, column_sum, bias, dtype, activation):
    return q.new_empty(_shape(q, outputs, activation), dtype=dtype)


@int8_mm.register_fake
def _(q, row_scale, zero, qweight, scale, column_sum, bias, dtype, activation):
    return q.new_empty(_shape(q, qweight.shape[0], activation), dtype=dtype)


@fp8_mm.register_fake
def _(q, row_scale, qweight, scale, bias, dtype, activation):
    return q.new_empty(_shape(q, qweight.shape[0], activation), dtype=dtype)


# Products of float activations with weights that become floats on the way.


@operator("fxc_cuda::weight_only_linear")
def weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x [..., K], qweight int8 or float8_e4m3fn [N, K], scale float32 [N]: `fxc::int8_weight_only_linear` or
    `fxc::fp8_weight_only_linear`, then the activation."""
    shape = _shape(x, qweight.shape[0], activation)
    if launches(x):
        from fxc_kernels.cuda.weight_only import weight_only_linear

        return weight_only_linear(x, qweight, scale, bias, activation=activation)
    product = torch.nn.functional.linear(x.float(), qweight.float() * scale[:, None])
    return _finished(product, bias, activation, x.dtype).view(shape)


@operator("fxc_cuda::int4_linear")
def int4_weight_only_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, activation: str
) -> Tensor:
    """x [..., K], packed uint8 [N, K/2] from `fxc_kernels.cuda.int4_linear.prepack`, scale [N, K/group], zero uint8
    [N, K/group] or None: `fxc::int4_weight_only_linear`, then the activation."""
    shape = _shape(x, packed.shape[0], activation)
    if launches(x):
        from fxc_kernels.cuda.int4_linear import int4_weight_only_linear

        return int4_weight_only_linear(x, packed, scale, zero, bias, group, activation=activation)
    halves = packed.reshape(packed.shape[0], -1, group // 2)
    q = torch.cat([halves & int4_linear.LARGEST, halves >> int4_linear.BITS], dim=-1).float()
    q = q - (int4_linear.MIDDLE if zero is None else zero.float()[..., None])
    weight = (q * scale.float()[..., None]).flatten(1)
    return _finished(torch.nn.functional.linear(x.float(), weight), bias, activation, x.dtype).view(shape)


@weight_only_linear.register_fake
def _(x, qweight, scale, bias, activation):
    return x.new_empty(_shape(x, qweight.shape[0], activation))


@int4_weight_only_linear.register_fake
def _(x, packed, scale, zero, bias, group, activation):
    return x.new_empty(_shape(x, packed.shape[0], activation))


@operator("fxc_cuda::sparse24_linear")
def sparse24_prepacked_linear(
    x: Tensor, values: Tensor, meta: Tensor, outputs: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x [..., K] bfloat16 or float16 and a 2:4 weight [outputs, K] of that dtype, whose values and meta
    `fxc_kernels.cuda.sparse24_prepacked.prepack` made: `fxc::sparse24_linear`, then the activation."""
    weight = Prepacked(values, meta, outputs, x.shape[-1])
    if launches(x):
        from fxc_kernels.cuda.sparse24_prepacked_linear import prepacked_linear

        return prepacked_linear(x, weight, bias, activation=activation)
    product = torch.nn.functional.linear(x.float(), sparse24_linear.unpack(*unpack(weight)).float())
    return _finished(product, bias, activation, x.dtype)


@operator("fxc_cuda::sparse24_linear_float32")
def sparse24_float32_linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x float32 [..., K], values float32 [N, K/2] and meta uint8 [N, K/8] as the portable operator has them, because sparse
    tensor cores multiply no float32: `fxc::sparse24_linear`, then the activation."""
    if launches(x):
        from fxc_kernels.cuda.sparse24 import sparse24_linear as linear

        return linear(x, values, meta, bias, activation=activation)
    product = torch.nn.functional.linear(x, sparse24_linear.unpack(values, meta))
    return _finished(product, bias, activation, x.dtype)


@sparse24_prepacked_linear.register_fake
def _(x, values, meta, outputs, bias, activation):
    return x.new_empty(_shape(x, outputs, activation))


@sparse24_float32_linear.register_fake
def _(x, values, meta, bias, activation):
    return x.new_empty(_shape(x, values.shape[0], activation))
