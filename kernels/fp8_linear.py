"""The fp8 linear ops: ``fxc::fp8_linear``, ``fxc::fp8_static_linear`` and ``fxc::fp8_weight_only_linear``.

The plain torch functions of these names, with ``_reference`` where an op has kernels, are the meaning of the ops: every kernel
and every lowering is judged against them. Weights are e4m3 (4 bits of exponent, 3 of mantissa, no
infinities, at most 448), one float32 scale per row.

``fp8_linear`` quantizes each row (token) of x by itself when it runs:

    s = amax(|row|) / 448      q = e4m3(clamp(row * (1 / s), -448, 448))      row ~= s * q
    y[n] = s * scale[n] * sum_k q[k] * w[n, k] + bias[n]

``fp8_static_linear`` does the same with one s for all of x, x_scale, that was learned from data.
"""

import torch
from torch import Tensor

from fxc_kernels.no_gradient import operator
from fxc_kernels.row_scaled import check

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# The CUDA devices that have such products: 8.9 and newer.
FP8_CAPABILITY = 89
# A row whose largest magnitude is not above this counts as all zero: below it, 1/scale would overflow float32.
ZERO_ROW = 1e-30


def row_scales(rows: Tensor) -> Tensor:
    """float32 rows [M, K] -> the scale [M, 1] that puts their largest magnitude at 448: 1 for an all-zero row, not finite
    for one that holds NaN or Inf."""
    amax = rows.abs().amax(dim=-1, keepdim=True)
    return torch.where(amax <= ZERO_ROW, 1.0, amax / FP8_MAX)


def round_to_fp8(values: Tensor) -> Tensor:
    """float32 -> e4m3, to nearest with halves to even; what lies beyond 448 becomes 448, NaN stays."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` [M, K] (float, K > 0) by the module's formula: (e4m3 [M, K], scale float32 [M, 1])."""
    row = x.float()
    scale = row_scales(row)
    return round_to_fp8(row * scale.reciprocal()), scale


def dequantize(qweight: Tensor, scale: Tensor) -> Tensor:
    """qweight e4m3 [N, K] times scale float32 [N], float32 [N, K]."""
    return qweight.float() * scale[:, None]


def fp8_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on fp8 weights with activations quantized per row (token) at run time, by the module's formula.

    x [..., K] float32/bfloat16/float16, qweight e4m3 [N, K], scale float32 [N], bias [N] or None; returns [..., N] in
    x's dtype. The products of two e4m3 numbers are exact in float32, in which they are summed.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    check(x, qweight, scale, bias, FP8)
    if x.shape[-1] == 0:
        return fp8_weight_only_linear_reference(x, qweight, scale, bias)
    q, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    out = (q.float() @ qweight.float().t()) * scale * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], scale.shape[0])


def fp8_weight_only_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on fp8 weights and float activations: x @ (qweight * scale)^T + bias, in float32.

    Shapes, dtypes and errors as in ``fp8_linear_reference``.
    """
    check(x, qweight, scale, bias, FP8)
    weight = dequantize(qweight, scale)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@operator("fxc::fp8_linear")
def fp8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fp8_linear_reference`."""
    return fp8_linear_reference(x, qweight, scale, bias)


@operator("fxc::fp8_weight_only_linear")
def fp8_weight_only_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fp8_weight_only_linear_reference`."""
    return fp8_weight_only_linear_reference(x, qweight, scale, bias)


@operator("fxc::fp8_static_linear")
def fp8_static_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float) -> Tensor:
    """Linear layer on fp8 weights, all activations quantized by one scale, by the module's formula.

    Shapes, dtypes and errors as in ``fp8_linear_reference``, and ValueError for a scale that is not positive and finite.
    """
    check(x, qweight, scale, bias, FP8)
    _check_scale(x_scale)
    q = round_to_fp8(x.float() * (1 / x_scale))
    out = torch.nn.functional.linear(q.float(), qweight.float()) * (scale * x_scale)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _check_scale(x_scale: float) -> None:
    if not 0 < x_scale < float("inf"):
        raise ValueError(f"x_scale has to be positive and finite: {x_scale}")


@fp8_static_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float) -> Tensor:
    _check_scale(x_scale)
    return _fake(x, qweight, scale, bias)


def _fake(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, qweight, scale, bias, FP8)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


fp8_linear.register_fake(_fake)
fp8_weight_only_linear.register_fake(_fake)
