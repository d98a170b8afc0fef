"""What comes right before a quantized product, fused with the quantization of its rows: RMSNorm, after a residual sum or not,
and silu(gate) * up. The rows are read and written once instead of two or three times.

References: `rms_norm_reference` and `silu_mul_reference` below, then `fxc_kernels.int8_linear.quantize_rows` or
`fxc_kernels.fp8_linear.quantize_rows`. What is rounded to the model's dtype there is rounded here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.quantize_rows import check_kept, empty_quantized, row_block, store_quantized
from fxc_kernels.cuda.rms_norm import norm_of_row, norm_rows
from fxc_kernels.cuda.tile import Build, flat_rows, on_device_of_first


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K], weight [K] -> (the norm as Llama and Qwen compute it, x + residual), both in x's dtype."""
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype), total


def silu_mul_reference(merged: Tensor) -> Tensor:
    """merged [..., 2 F], gate then up -> silu(gate) * up [..., F]."""
    gate, up = merged.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def rms_norm_quantize_kernel(x, residual, total, weight, q, scale, zero, K, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    at = row * K + columns
    weighted = norm_of_row(x, residual, total, weight, at, columns, inside, K, eps)
    store_quantized(weighted, inside, at, row, q, scale, zero)


@triton.jit
def silu_mul_quantize_kernel(merged, q, scale, zero, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < F
    dtype: tl.constexpr = merged.dtype.element_ty
    gate = tl.load(merged + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(merged + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    product = (activated * up).to(dtype).to(tl.float32)
    store_quantized(product, inside, row * F + columns, row, q, scale, zero)


@on_device_of_first
def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [..., K], weight [K] -> (q [M, K], scale [M], zero [M] or None, x + residual [..., K])."""
    flat, total = norm_rows(x, weight, residual)
    rows, columns = flat.shape
    q, scale, zero = empty_quantized(rows, columns, dtype, x.device)
    if rows:
        block, warps, _ = row_block(columns)
        rms_norm_quantize_kernel[(rows,)](
            flat, None if residual is None else flat_rows(residual), total, weight, q, scale, zero, columns, eps,
            BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale, zero, total.reshape(x.shape)


@on_device_of_first
def silu_mul_quantize(merged: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor, Tensor | None]:
    """merged [..., 2 F], gate then up -> silu(gate) * up as (q [M, F], scale [M], zero [M] or None)."""
    if merged.shape[-1] % 2:
        raise ValueError(f"gate and up must be of one size, but together they have {merged.shape[-1]} columns")
    flat = flat_rows(merged)
    rows, columns = flat.shape[0], flat.shape[1] // 2
    check_kept(columns)
    q, scale, zero = empty_quantized(rows, columns, dtype, merged.device)
    if rows:
        block, warps, _ = row_block(columns)
        silu_mul_quantize_kernel[(rows,)](flat, q, scale, zero, columns, BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    return q, scale, zero


def builds(capability: int) -> list[Build]:
    made = []
    for kind, pointer in (("int8", "*i8"), ("fp8", "*fp8e4nv")) if capability >= 89 else (("int8", "*i8"),):
        stored = {"q": pointer, "scale": "*fp32", "zero": "*i32" if kind == "int8" else None}
        for columns in (3584, 8192):
            block, warps, _ = row_block(columns)
            arguments = {
                "x": "*bf16", "residual": "*bf16", "total": "*bf16", "weight": "*bf16", **stored, "K": "i32", "eps": "fp32",
                "BLOCK": block,
            }  # fmt: skip
            name = f"rms_norm_quantize {kind} K={columns}"
            made.append(Build(name, rms_norm_quantize_kernel, arguments, warps, 3, wide="x + ", fp_fusion=False))
        for columns in (14336, 29568):
            block, warps, _ = row_block(columns)
            arguments = {"merged": "*bf16", **stored, "F": "i32", "BLOCK": block}
            name = f"silu_mul_quantize {kind} F={columns}"
            made.append(Build(name, silu_mul_quantize_kernel, arguments, warps, 3, wide="merged + ", fp_fusion=False))
    return made
