"""The int8 linear ops: ``fxc::int8_linear`` and ``fxc::int8_weight_only_linear``.

The plain torch functions ``int8_linear_reference`` and ``int8_weight_only_linear_reference`` are the meaning of the
ops: every kernel and every lowering is judged against them. Weights are symmetric int8, one float32 scale per row.

``int8_linear`` quantizes each row (token) of x by itself, asymmetric, when it runs:

    lo = min(amin(row), 0)    hi = max(amax(row), 0)    s = (hi - lo) / 255    z = round(-128 - lo / s)
    q = clamp(round(row / s) + z, -128, 127)            row ~= s * (q - z)
    y[n] = s * scale[n] * (sum_k q[k] * w[n, k] - z * colsum[n]) + bias[n]     colsum[n] = sum_k w[n, k]

The zero point keeps all 256 steps when a row's outliers lie on one side, as after GELU. The scheme and the integer
correction z * colsum are those of gemmlowp (B. Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 2.3), applied per token; vLLM calls the term "azp".

The CPU kernels run the same integers through ``torch._int_mm`` where that is exact, ``int8_linear`` on CUDA through a Triton
kernel; they need no prepared weights and are meant for programs that were not lowered, and for the experts of a mixture.
Everything else runs the reference itself.
"""

import functools

import torch
from torch import Tensor

from fxc_kernels.int8_exact import is_exact
from fxc_kernels.no_gradient import refuse_gradient
from fxc_kernels.row_scaled import check

INT8_MIN, INT8_MAX = -128, 127
INT8_STEPS = INT8_MAX - INT8_MIN
# A row whose range is not above this counts as all zero: below it, 1/scale would overflow float32.
ZERO_ROW = 1e-30
# Up to this K, sum(q * w) - z * colsum stays within int32: |q - z| <= 255 and |w| <= 128.
INT32_COLUMNS = (2**31 - 1) // (INT8_STEPS * 128)


def row_parameters(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s, 1 / s, z) of each row of ``x`` [M, K] (float, K > 0) by the module's formula, all float32 [M, 1].

    An all-zero row has scale 1. A row holding NaN or Inf, or one whose hi - lo overflows float32, gets a scale of NaN or
    Inf, so that what is computed from it is not finite either.
    """
    row = x.float()
    lo = row.amin(dim=-1, keepdim=True).clamp(max=0)
    span = row.amax(dim=-1, keepdim=True).clamp(min=0) - lo
    scale = torch.where(span <= ZERO_ROW, 1.0, span / INT8_STEPS)
    inverse = scale.reciprocal()
    return scale, inverse, (INT8_MIN - lo * inverse).round()


def round_rows(x: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    """clamp(round(x * inverse) + zero_point) as int8, halves to even: x [M, K] float, the others from `row_parameters`."""
    # Clamped as integers: compiled, a float clamp costs more because it keeps NaN.
    q = ((x.float() * inverse).round() + zero_point).to(torch.int32)
    return q.clamp(INT8_MIN, INT8_MAX).to(torch.int8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row of ``x`` [M, K] (float, K > 0): (int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1])."""
    scale, inverse, zero_point = row_parameters(x)
    return round_rows(x, inverse, zero_point), scale, zero_point.to(torch.int32)


def _rescale(acc: Tensor, row_scale: Tensor, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """acc [M, N] * scale [N] * row_scale [M, 1] + bias in float32, then x's dtype and leading shape."""
    out = acc.float() * scale * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], scale.shape[0])


def _without_terms(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The result when K == 0: an empty sum, so the bias alone."""
    out = x.new_zeros(*x.shape[:-1], scale.shape[0])
    return out if bias is None else out + bias.to(x.dtype)


def int8_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer on int8 weights with activations quantized per row (token) at run time, by the module's formula.

    x [..., K] float32/bfloat16/float16, qweight int8 [N, K], scale float32 [N], bias [N] or None; returns [..., N] in
    x's dtype.
    The sums are exact: float64 holds every integer they can reach for K < 2**38.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape.
    """
    check(x, qweight, scale, bias, torch.int8)
    if x.shape[-1] == 0:
        return _without_terms(x, scale, bias)
    q, row_scale, zero_point = quantize_rows(x.reshape(-1, x.shape[-1]))
    acc = (q.double() - zero_point) @ qweight.double().t()
    return _rescale(acc, row_scale, x, scale, bias)


def int8_weight_only_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer on int8 weights and float activations: x @ (qweight * scale)^T + bias, in float32.

    Shapes, dtypes and errors as in ``int8_linear_reference``.
    """
    check(x, qweight, scale, bias, torch.int8)
    weight = qweight.float() * scale[:, None]
    out = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return out.to(x.dtype)


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` is exact in this process: without VNNI it saturates (see `int8_exact`)."""
    return is_exact(lambda weight: lambda q: torch._int_mm(q, weight.t()))


def _int8_linear_cpu(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, qweight, scale, bias, torch.int8)
    columns = x.shape[-1]
    # torch._int_mm (2.13, CPU) returns wrong numbers when K == 1: it reads the transposed [N, 1] as if it were [1, N].
    if x.numel() == 0 or qweight.numel() == 0 or columns == 1 or columns > INT32_COLUMNS or not int_mm_is_exact():
        return int8_linear_reference(x, qweight, scale, bias)
    q, row_scale, zero_point = quantize_rows(x.reshape(-1, columns))
    column_sum = qweight.sum(dim=1, dtype=torch.int32)
    acc = torch._int_mm(q, qweight.t()).addcmul_(zero_point, column_sum, value=-1)
    return _rescale(acc, row_scale, x, scale, bias)


def _int8_linear_cuda(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, qweight, scale, bias, torch.int8)
    is_wide = x.shape[-1] > INT32_COLUMNS or x.dtype == torch.float64
    if x.numel() == 0 or qweight.numel() == 0 or is_wide:
        return int8_linear_reference(x, qweight, scale, bias)
    from fxc_kernels.cuda import scaled_mm  # imports Triton, which not every platform has

    return scaled_mm.int8_linear(x, qweight, scale, bias)


def _int8_weight_only_linear_cpu(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, qweight, scale, bias, torch.int8)
    weight = (qweight.float() * scale[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, qweight, scale, bias, torch.int8)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _register(name: str, reference, cpu_kernel) -> None:
    torch.library.define(f"fxc::{name}", "(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor")
    torch.library.impl(f"fxc::{name}", "default", reference)
    torch.library.impl(f"fxc::{name}", "cpu", cpu_kernel)
    torch.library.register_fake(f"fxc::{name}", _fake)
    refuse_gradient(f"fxc::{name}")


_register("int8_linear", int8_linear_reference, _int8_linear_cpu)
torch.library.impl("fxc::int8_linear", "cuda", _int8_linear_cuda)
_register("int8_weight_only_linear", int8_weight_only_linear_reference, _int8_weight_only_linear_cpu)
