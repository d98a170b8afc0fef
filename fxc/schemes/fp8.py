"""fp8 weights: e4m3, one scale per output channel.

    qweight  float8_e4m3fn [N, K], one byte a number:

        bit   7   6  5  4  3   2  1  0
              s   e  e  e  e   m  m  m        (-1)^s * 2^(e-7) * (1 + m/8), subnormal for e = 0: (-1)^s * 2^-6 * m/8
                                              largest 448 = 0x7E; 0x7F and 0xFF are NaN, there is no infinity
    scale    float32 [N]                      w[n, k] ~= scale[n] * qweight[n, k]

The ops that use them are in fxc_kernels.fp8_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.schemes.checks import check_weight
from fxc.schemes.scheme import Product, Scheme, register
from fxc_kernels.fp8_linear import FP8, FP8_CAPABILITY, FP8_MAX, dequantize, quantize_rows, round_to_fp8, row_scales

__all__ = ["FP8_MAX", "LINEAR", "SCHEME", "STATIC", "WEIGHT_ONLY", "dequantize", "pack", "quantize_weight", "unpack"]

LINEAR = torch.ops.fxc.fp8_linear.default
STATIC = torch.ops.fxc.fp8_static_linear.default
WEIGHT_ONLY = torch.ops.fxc.fp8_weight_only_linear.default


def pack(values: Tensor) -> Tensor:
    """float32 -> the bytes uint8 of the nearest e4m3 numbers, at most 448 in magnitude."""
    return round_to_fp8(values.float()).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The bytes uint8 of e4m3 numbers -> their values, float32, exactly."""
    return packed.view(FP8).float()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [N, K] (any float dtype) to e4m3 [N, K] with a float32 scale [N].

    scale = amax(|row|) / 448, or 1 for an all-zero row (and for K == 0), so that |w - w'| <= |w| / 16 for all but the
    numbers below scale / 64, which are within scale / 1024. Raises InputRefused when the weight is not a float matrix or
    holds NaN or Inf.
    """
    check_weight(weight, "fp8")
    rows, columns = weight.shape
    if weight.numel() == 0:
        return weight.new_empty(rows, columns, dtype=FP8), weight.new_ones(rows, dtype=torch.float32)
    values = weight.detach().float()
    scale = row_scales(values)
    return round_to_fp8(values / scale), scale.squeeze(1)


def _rounded_rows(x: Tensor) -> Tensor:
    """x [..., K] as `fxc::fp8_linear` rounds it, row by row, float32."""
    q, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    return (q.float() * scale).view(x.shape)


def _rounded_by(x: Tensor, x_scale: float) -> Tensor:
    return round_to_fp8(x.float() * (1 / x_scale)).float() * x_scale


def _why_not(capability: int) -> str | None:
    if capability >= FP8_CAPABILITY:
        return None
    return f"this chip has no float8 products: compute capability {capability / 10:.1f}, and they need {FP8_CAPABILITY / 10}"


SCHEME = register(
    Scheme(
        name="fp8",
        label="fp8",
        parts={"qweight": None, "scale": "scales"},
        products=(
            Product(
                LINEAR,
                "fp8",
                "fp8 linear",
                activations=FP8,
                why_not=_why_not,
                instead="compile with fp8:mode=weight_only, which runs on any chip, or with int8",
                rounded=_rounded_rows,
            ),
            # By its definition everywhere, so that any chip runs it.
            Product(
                STATIC, "fp8_static", "fp8 linear", activations=FP8, learned={"x_scale": 0.0125}, rounded=_rounded_by
            ),
            Product(WEIGHT_ONLY, "fp8_weight_only", "fp8 linear"),
        ),
        quantize=quantize_weight,
        dequantize=dequantize,
        levels=lambda qweight: (qweight.float(), -FP8_MAX, FP8_MAX),
    )
)
