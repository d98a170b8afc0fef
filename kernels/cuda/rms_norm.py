"""RMSNorm, with the residual sum before it or not, in one kernel: what a decoder whose activations stay floats runs instead of
seven. `fxc_kernels.cuda.norm_quantize` is the same with a quantization behind it, and has the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.quantize_rows import check_kept, row_block
from fxc_kernels.cuda.tile import Build, check_vectors, flat_rows, on_device_of_first


@triton.jit
def norm_of_row(x, residual, total, weight, at, columns, inside, K, eps):
    """The norm of a row at `at` in float32, rounded as x. Where there is a residual, its sum with x is stored in total."""
    dtype: tl.constexpr = x.dtype.element_ty
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values = (values + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + at, values, mask=inside)
        values = values.to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / K + eps))
    normed = (values * inverse).to(dtype).to(tl.float32)
    return (normed * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def rms_norm_kernel(x, residual, total, weight, out, K, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    at = tl.program_id(0).to(tl.int64) * K + columns
    weighted = norm_of_row(x, residual, total, weight, at, columns, inside, K, eps)
    tl.store(out + at, weighted.to(out.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows [M, K] of x, room for their sums with the residual, or the rows themselves). Raises ValueError where x [..., K],
    weight [K] and residual [..., K] do not fit or K is not from 1 to KEPT."""
    flat = flat_rows(x)
    check_vectors(flat.shape[1], weight=weight)
    check_kept(flat.shape[1])
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual {tuple(residual.shape)} must have the shape of x, {tuple(x.shape)}")
    return flat, flat if residual is None else torch.empty_like(flat)


@on_device_of_first
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K], weight [K], up to 32768 columns -> (the norm as Llama and Qwen compute it, x + residual), both [..., K].
    The second is x itself where there is no residual."""
    flat, total = norm_rows(x, weight, residual)
    rows, columns = flat.shape
    out = torch.empty_like(flat)
    if rows:
        block, warps, _ = row_block(columns)
        rms_norm_kernel[(rows,)](
            flat, None if residual is None else flat_rows(residual), total, weight, out, columns, eps,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out.reshape(x.shape), total.reshape(x.shape)


def builds(capability: int) -> list[Build]:
    made = []
    for columns in (3584, 8192):
        block, warps, _ = row_block(columns)
        arguments = {
            "x": "*bf16", "residual": "*bf16", "total": "*bf16", "weight": "*bf16", "out": "*bf16", "K": "i32", "eps": "fp32",
            "BLOCK": block,
        }  # fmt: skip
        made.append(Build(f"rms_norm K={columns}", rms_norm_kernel, arguments, warps, 3, wide="x + "))
    return made
