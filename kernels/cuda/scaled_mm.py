"""The product of rows and weights that are both 8 bits wide, int8 or float8_e4m3fn, with everything else in its epilogue.

The reference of `scaled_mm` is `scaled_mm_reference`; `int8_linear` and `fp8_linear` put the quantization of rows before it,
and theirs are `fxc_kernels.int8_linear.int8_linear_reference` and `fxc_kernels.fp8_linear.fp8_linear_reference`. Weights stay
[N, K], the layout that 8-bit tensor cores and 16-byte loads want. Up to 64 rows the product is out^T = W x^T and K is cut
(`split_k`). From 1024 rows on, sm_90 has `persistent_mm`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda import quantize_rows
from fxc_kernels.cuda.dispatch import SKINNY_ROWS, config_for
from fxc_kernels.cuda.persistent_mm import GROUP, fits, persistent_mm
from fxc_kernels.cuda.split_k import finish_part, part_length, reduce_parts, reduce_parts_kernel, workspace
from fxc_kernels.cuda.tile import (
    Build,
    Config,
    capability_of,
    check_vectors,
    dot_instruction,
    epilogue_types,
    finish_in_halves,
    on_device_of_first,
    output_columns,
    swizzled_tile,
)
from fxc_kernels.fp8_linear import FP8_CAPABILITY
from fxc_kernels.int8_linear import INT32_COLUMNS

# Chosen from the literature for Hopper and Ampere, compiled without spills; not yet measured by this project.
CONFIGS = {
    80: (
        Config(16, 16, 64, 256, 4, 4, split=4),
        Config(32, 32, 64, 256, 4, 4, split=4),
        Config(64, 64, 64, 128, 4, 4, split=2),
        Config(256, 64, 128, 128, 4, 4),
        Config(None, 128, 128, 64, 4, 4),
    ),
    90: (
        Config(16, 16, 64, 256, 4, 5, split=4),
        Config(32, 32, 64, 256, 4, 5, split=4),
        Config(64, 64, 64, 256, 4, 4, split=2),
        Config(256, 64, 128, 128, 4, 4),
        Config(1023, 128, 128, 128, 8, 4),
        # That the persistent kernel is faster here is what the literature says of others like it.
        Config(None, 128, 256, 128, 8, 4, tma=True),
    ),
}


def scaled_mm_reference(q, row_scale, zero, qweight, scale, bias=None) -> Tensor:
    """q [M, K] and qweight [N, K], both int8 or both float8_e4m3fn, row_scale [M], zero int32 [M] or None, scale [N] ->
    float32 [M, N] = (q - zero) qweight^T * scale * row_scale + bias. The sums are in float64."""
    rows = q.double() if zero is None else q.double() - zero[:, None]
    out = (rows @ qweight.double().t()).float() * scale * row_scale[:, None]
    return out if bias is None else out + bias.float()


@triton.jit
def add_products(
    acc, q_at, w_at, rk, left, TURNED: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc [m, n] + q w^T over `left` columns from q_at [m, BLOCK_K] and w_at [n, BLOCK_K] on. TURNED: acc [n, m] + w q^T."""
    for k in range(0, tl.cdiv(left, BLOCK_K)):
        if WHOLE_K:
            a = tl.load(q_at)
            b = tl.load(w_at)
        else:
            inside = (rk < left - k * BLOCK_K)[None, :]
            a = tl.load(q_at, mask=inside, other=0.0)
            b = tl.load(w_at, mask=inside, other=0.0)
        if TURNED:
            acc = tl.dot(b, tl.trans(a), acc, out_dtype=acc.dtype)
        else:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=acc.dtype)
        q_at += BLOCK_K
        w_at += BLOCK_K
    return acc


@triton.jit
def scaled_mm_kernel(
    q, w, out, row_scale, zero, scale, column_sum, bias, M, N, K,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = swizzled_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one: a mask would only cost, and what they give is not stored.
    q_at = q + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + rk[None, :]
    w_at = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K + rk[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = add_products(acc, q_at, w_at, rk, K, False, WHOLE_K, BLOCK_K)
    finish_in_halves(acc, rm, tile_n * BLOCK_N, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)


@triton.jit
def skinny_mm_kernel(
    q, w, out, parts, row_scale, zero, scale, column_sum, bias, M, N, K, part_k,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    start = part * part_k
    rk = tl.arange(0, BLOCK_K)
    q_at = q + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    w_at = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    acc = add_products(acc, q_at, w_at, rk, tl.minimum(part_k, K - start), True, WHOLE_K, BLOCK_K)
    finish_part(
        tl.trans(acc), rm, rn, part, M, N, out, parts, row_scale, zero, scale, column_sum, bias, ACTIVATION
    )  # fmt: skip


@on_device_of_first
def scaled_mm(
    q: Tensor, row_scale: Tensor, zero: Tensor | None, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    column_sum: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, activation: str = "none",
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`scaled_mm_reference` on a GPU, rounded to `dtype`, then `activation`. column_sum int32 [N]: the sums of qweight's
    rows, which `zero` needs; computed here when it is None."""
    (rows, columns), outputs = q.shape, qweight.shape[0]
    if q.dtype != qweight.dtype or q.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"rows and weights must both be int8 or both float8_e4m3fn, got {q.dtype} and {qweight.dtype}")
    if columns != qweight.shape[1] or not q.is_contiguous() or not qweight.is_contiguous():
        raise ValueError(f"rows {tuple(q.shape)} and weights {tuple(qweight.shape)} must be contiguous and of one K")
    if q.dtype == torch.int8 and columns > INT32_COLUMNS:
        raise ValueError(f"K = {columns} is more than {INT32_COLUMNS}, beyond which int32 sums can overflow")
    check_vectors(rows, row_scale=row_scale, zero=zero)
    check_vectors(outputs, scale=scale, bias=bias, column_sum=column_sum)
    if q.dtype == torch.float8_e4m3fn and q.is_cuda:
        check_fp8(capability_of(q))
    out = torch.empty(rows, output_columns(outputs, activation), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if zero is not None and column_sum is None:
        column_sum = qweight.sum(dim=1, dtype=torch.int32)
    acc = tl.int32 if q.dtype == torch.int8 else tl.float32
    kind = "int8" if q.dtype == torch.int8 else "fp8"
    config = config or config_for(kind, q, outputs, columns, CONFIGS)
    epilogue = (row_scale, zero, scale, column_sum, bias)
    if config.tma and fits(q, qweight, out):
        persistent_mm(q, qweight, out, epilogue, activation, config)
        return out
    shared = {
        "ACC": acc, "WHOLE_K": columns % config.k == 0, "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    tiles_m, tiles_n = triton.cdiv(rows, config.m), triton.cdiv(outputs, config.n)
    if rows > SKINNY_ROWS or config.tma:
        scaled_mm_kernel[(tiles_m * tiles_n,)](
            q, qweight, out, *epilogue, rows, outputs, columns, GROUP_M=GROUP, ACTIVATION=activation, **shared
        )
        return out
    length, split = part_length(columns, config.k, config.split)
    parts = workspace(split, out, outputs, integers=acc == tl.int32)
    skinny_mm_kernel[(tiles_n, tiles_m, split)](
        q, qweight, out, parts, *epilogue, rows, outputs, columns, length, ACTIVATION=activation, **shared
    )
    reduce_parts(parts, out, *epilogue, activation)
    return out


def check_fp8(capability: int) -> None:
    if capability < FP8_CAPABILITY:
        raise RuntimeError(
            f"float8 products need a chip of compute capability 8.9 or newer, and this one is {capability / 10:.1f}: "
            "use fp8 weight-only here, or int8"
        )


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    column_sum: Tensor | None = None, activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`int8_linear_reference` on a GPU, then `activation`. K has to be above 0."""
    q, row_scale, zero = quantize_rows.quantize_rows(x)
    out = scaled_mm(
        q, row_scale, zero, qweight, scale, bias,
        column_sum=column_sum, dtype=x.dtype, activation=activation, config=config,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], out.shape[-1])


def fp8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`fp8_linear_reference` on a GPU, then `activation`. Raises RuntimeError on a chip without float8 products."""
    if x.is_cuda:
        check_fp8(capability_of(x))
    q, row_scale, _ = quantize_rows.quantize_rows(x, torch.float8_e4m3fn)
    out = scaled_mm(q, row_scale, None, qweight, scale, bias, dtype=x.dtype, activation=activation, config=config)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def builds(capability: int) -> list[Build]:
    made = []
    generation = max(each for each in CONFIGS if each <= capability)
    for kind in ("int8", "fp8") if capability >= FP8_CAPABILITY else ("int8",):
        for config in CONFIGS[generation]:
            skinny = config.rows is not None and config.rows <= SKINNY_ROWS
            made.append(_build(kind, config, skinny, capability))
    for kind in ("int8", "fp8") if capability >= FP8_CAPABILITY else ("int8",):
        arguments = {
            "parts": "*i32" if kind == "int8" else "*fp32", **epilogue_types(kind), "out": "*bf16", "M": "i32", "N": "i32",
            "SPLIT": 4, "ACTIVATION": "none", "BLOCK_M": 4, "BLOCK_N": 256,
        }  # fmt: skip
        made.append(Build(f"reduce_parts {kind}", reduce_parts_kernel, arguments, 4, 3, wide="parts + "))
    return made


def _build(kind: str, config: Config, skinny: bool, capability: int) -> Build:
    pointer = "*i8" if kind == "int8" else "*fp8e4nv"
    acc = tl.int32 if kind == "int8" else tl.float32
    parts = {}
    if skinny:
        parts = {"parts": None if config.split == 1 else "*i32" if kind == "int8" else "*fp32"}
    arguments = {
        "q": pointer, "w": pointer, "out": "*bf16", **parts, **epilogue_types(kind), "M": "i32", "N": "i32", "K": "i32",
        **({"part_k": "i32"} if skinny else {}), "ACC": acc, "ACTIVATION": "none", "WHOLE_K": True,
        "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k, **({} if skinny else {"GROUP_M": GROUP}),
    }  # fmt: skip
    types = "s8.s8" if kind == "int8" else "e4m3.e4m3"
    # A configuration for the TMA is also that of the kernel with pointers, for what the TMA cannot read.
    name = f"{kind} {'skinny' if skinny else 'gemm'} {replace(config, tma=False)}"
    kernel = skinny_mm_kernel if skinny else scaled_mm_kernel
    return Build(name, kernel, arguments, config.warps, config.stages, dot_instruction(capability, types))
