"""Products of float rows and weights of one byte each, int8 or float8_e4m3fn, that become floats in registers.

References: `fxc_kernels.int8_linear.int8_weight_only_linear_reference` and
`fxc_kernels.fp8_linear.fp8_weight_only_linear_reference`. Up to four rows (tokens) CUDA cores multiply in float32, up to 64
tensor cores compute out^T = W x^T in x's dtype, and beyond that the weight is turned into a matrix of x's dtype once, for
torch's own product. float32 rows are many from five on. float8 needs no float8 instruction here, so this is also what older
chips run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda import many_rows
from fxc_kernels.cuda.dispatch import GEMV_ROWS, config_for
from fxc_kernels.cuda.split_k import finish_part, part_length, reduce_parts, reduce_parts_kernel, workspace
from fxc_kernels.cuda.tile import (
    INTERPRETED,
    Build,
    Config,
    capability_of,
    check_vectors,
    dot_floats,
    dot_instruction,
    epilogue_types,
    insert_before,
    on_device_of_first,
)

_GEMV = (
    Config(1, 1, 8, 512, 4, 2, split=2, fill=16),
    Config(2, 2, 8, 512, 4, 2, split=2, fill=16),
    Config(GEMV_ROWS, 4, 8, 512, 4, 2, split=2, fill=16),
)
# From the literature and compiled without spills; not yet measured by this project.
CONFIGS = {
    80: (
        *_GEMV,
        Config(16, 16, 64, 128, 4, 4, split=4, fill=4),
        Config(32, 32, 64, 128, 4, 4, split=4, fill=4),
        Config(64, 64, 64, 64, 4, 4, split=2, fill=4),
    ),
    90: (
        *_GEMV,
        Config(16, 16, 64, 128, 4, 5, split=4, fill=4),
        Config(32, 32, 64, 128, 4, 5, split=4, fill=4),
        Config(64, 64, 64, 128, 4, 4, split=2, fill=4),
    ),
}


@triton.jit
def decode(raw, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Bytes as numbers of `dtype`. For fp8 they are 256 times too small, which the caller puts right after summing."""
    if FORMAT == "int8":
        if dtype == tl.float32 or INTERPRETED:
            # A byte below the exponent of 2^23 is that number: cheaper than a conversion, of which a chip does few a cycle.
            bits = (raw.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32) | 0x4B000000
            return bits.to(tl.float32, bitcast=True) - 8388736.0
        else:
            return raw.to(dtype)
    else:
        # e4m3 and float16 differ in the width of the exponent: shifted in place, the bias is 8 too large.
        bits = raw.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return half.to(dtype)


@triton.jit
def gemv_step(acc, values, x_at, inside, WHOLE_K: tl.constexpr):
    """acc [n, c] + sum over e of values [n, c, e] * x [c, e]: the sum over e stays within a thread."""
    if WHOLE_K:
        token = tl.load(x_at)
    else:
        token = tl.load(x_at, mask=inside, other=0.0)
    return acc + tl.sum(values * token.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def gemv_kernel(
    x, w, out, parts, scale, bias, M, N, K, part_k,
    FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = BLOCK_K // 16
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    start = part * part_k
    left = tl.minimum(part_k, K - start)
    # Sixteen neighbours are one 128-bit load of a thread.
    rk = tl.arange(0, CHUNKS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x0 = x + start + rk
    w_at = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None, None] * K + (start + rk)[None, :, :]
    acc0 = tl.zeros((BLOCK_N, CHUNKS), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    # Rows past the end read the last one; what they give is not stored.
    x1 = x0 + tl.minimum(1, M - 1) * K
    x2 = x0 + tl.minimum(2, M - 1) * K
    x3 = x0 + tl.minimum(3, M - 1) * K
    for k in range(0, left, BLOCK_K):
        inside = rk < left - k
        if WHOLE_K:
            raw = tl.load(w_at + k, eviction_policy="evict_first")
        else:
            raw = tl.load(w_at + k, mask=inside[None, :, :], other=0, eviction_policy="evict_first")
        values = decode(raw, FORMAT, tl.float32)
        acc0 = gemv_step(acc0, values, x0 + k, inside, WHOLE_K)
        if BLOCK_M > 1:
            acc1 = gemv_step(acc1, values, x1 + k, inside, WHOLE_K)
        if BLOCK_M > 2:
            acc2 = gemv_step(acc2, values, x2 + k, inside, WHOLE_K)
            acc3 = gemv_step(acc3, values, x3 + k, inside, WHOLE_K)
    FACTOR: tl.constexpr = 256.0 if FORMAT == "fp8" else 1.0
    row = tl.arange(0, 1)
    store_result(tl.sum(acc0, axis=1)[None, :] * FACTOR, row, rn, part, M, N, out, parts, scale, bias, ACTIVATION)
    if BLOCK_M > 1:
        store_result(tl.sum(acc1, axis=1)[None, :] * FACTOR, row + 1, rn, part, M, N, out, parts, scale, bias, ACTIVATION)
    if BLOCK_M > 2:
        store_result(tl.sum(acc2, axis=1)[None, :] * FACTOR, row + 2, rn, part, M, N, out, parts, scale, bias, ACTIVATION)
        store_result(tl.sum(acc3, axis=1)[None, :] * FACTOR, row + 3, rn, part, M, N, out, parts, scale, bias, ACTIVATION)


@triton.jit
def store_result(result, rm, rn, part, M, N, out, parts, scale, bias, ACTIVATION: tl.constexpr):
    """`finish_part` where activations are floats: rows have no scales."""
    finish_part(result, rm, rn, part, M, N, out, parts, None, None, scale, None, bias, ACTIVATION)


@triton.jit
def skinny_kernel(
    x, w, out, parts, scale, bias, M, N, K, part_k,
    FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE_K: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """AHEAD: weights are loaded one tile ahead into registers, 128 bits at a time, instead of through shared memory."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rk = tl.arange(0, BLOCK_K)
    part = tl.program_id(2)
    start = part * part_k
    left = tl.minimum(part_k, K - start)
    x_at = x + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    w_at = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if AHEAD:
        following = tl.load(w_at, mask=(rk < left)[None, :], other=0, eviction_policy="evict_first")
    for k in range(0, left, BLOCK_K):
        inside = (rk < left - k)[None, :]
        if WHOLE_K:
            tokens = tl.load(x_at)
        else:
            tokens = tl.load(x_at, mask=inside, other=0.0)
        if AHEAD:
            raw = following
            beyond = (rk < left - k - BLOCK_K)[None, :]
            following = tl.load(w_at + BLOCK_K, mask=beyond, other=0, eviction_policy="evict_first")
        elif WHOLE_K:
            raw = tl.load(w_at)
        else:
            raw = tl.load(w_at, mask=inside, other=0)
        values = decode(raw, FORMAT, x.dtype.element_ty)
        acc = dot_floats(values, tl.trans(tokens), acc)
        x_at += BLOCK_K
        w_at += BLOCK_K
    result = tl.trans(acc)
    if FORMAT == "fp8":
        result *= 256.0
    store_result(result, rm, rn, part, M, N, out, parts, scale, bias, ACTIVATION)


@triton.jit
def dequantize_kernel(w, out, scale, N, K, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rn < N)[:, None] & (rk < K)[None, :]
    where = rn.to(tl.int64)[:, None] * K + rk[None, :]
    values = decode(tl.load(w + where, mask=inside, other=0), FORMAT, tl.float32)
    factor = tl.load(scale + rn, mask=rn < N, other=0.0)
    if FORMAT == "fp8":
        factor *= 256.0
    tl.store(out + where, (values * factor[:, None]).to(out.dtype.element_ty), mask=inside)


def load_ahead(capability: int) -> bool:
    """On sm_90 the tensor cores take the weight from registers, and what Triton copies for them into shared memory it copies
    8 bytes at a time: there the weight is loaded into registers at once. Older chips copy 16."""
    return capability >= 90


def check_gemv_rows(config: Config, rows: int) -> None:
    if config.m <= GEMV_ROWS and rows > config.m:
        raise ValueError(f"configuration {config} multiplies up to {config.m} rows, not {rows}")


def format_of(qweight: Tensor) -> tuple[str, Tensor]:
    if qweight.dtype == torch.int8:
        return "int8", qweight
    if qweight.dtype == torch.float8_e4m3fn:
        return "fp8", qweight.view(torch.uint8)
    raise TypeError(f"weights must be int8 or float8_e4m3fn, got {qweight.dtype}")


@on_device_of_first
def dequantize(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """qweight [N, K] * scale [N], computed in float32, as `dtype`."""
    kind, raw = format_of(qweight)
    out = torch.empty(qweight.shape, dtype=dtype, device=qweight.device)
    rows, columns = qweight.shape
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, 512))
    if out.numel():
        dequantize_kernel[grid](raw, out, scale, rows, columns, FORMAT=kind, BLOCK_N=8, BLOCK_K=512)
    return out


@on_device_of_first
def weight_only_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The reference on a GPU, then `activation`. K has to be above 0. A given config also decides the kernel."""
    kind, raw = format_of(qweight)
    outputs, columns = qweight.shape
    if x.shape[-1] != columns or not qweight.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} and qweight {tuple(qweight.shape)} must be contiguous and of one K")
    check_vectors(outputs, scale=scale, bias=bias)

    def kernel(flat: Tensor, out: Tensor) -> None:
        _few_rows(flat, kind, raw, scale, bias, out, activation, config)

    most = many_rows.weight_only_rows(x.dtype)
    return many_rows.linear(x, outputs, bias, activation, config, most, lambda: dequantize(qweight, scale, x.dtype), kernel)


def _few_rows(x, kind: str, raw: Tensor, scale, bias, out: Tensor, activation: str, config: Config | None) -> None:
    """Fill out [M, N] from rows x [M, K] and bytes [N, K]."""
    (rows, columns), outputs = x.shape, raw.shape[0]
    config = config or config_for(f"{kind}_weight_only", x, outputs, columns, CONFIGS)
    check_gemv_rows(config, rows)
    length, split = part_length(columns, config.k, config.split)
    parts = workspace(split, out, outputs)
    kernel, grid, ahead = gemv_kernel, (triton.cdiv(outputs, config.n), split), {}
    if config.m > GEMV_ROWS:
        ahead = {"AHEAD": load_ahead(capability_of(x))}
        kernel, grid = skinny_kernel, (triton.cdiv(outputs, config.n), triton.cdiv(rows, config.m), split)
    kernel[grid](
        x, raw, out, parts, scale, bias, rows, outputs, columns, length,
        FORMAT=kind, ACTIVATION=activation, WHOLE_K=columns % config.k == 0,
        BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k, num_warps=config.warps, num_stages=config.stages, **ahead,
    )  # fmt: skip
    reduce_parts(parts, out, None, None, scale, None, bias, activation)


def builds(capability: int) -> list[Build]:
    made = []
    generation = max(each for each in CONFIGS if each <= capability)
    for kind in ("int8", "fp8"):
        for config in CONFIGS[generation]:
            gemv = config.m <= GEMV_ROWS
            arguments = {
                "x": "*bf16", "w": "*i8" if kind == "int8" else "*u8", "out": "*bf16",
                "parts": "*fp32" if config.split > 1 else None, "scale": "*fp32", "bias": "*bf16",
                "M": "i32", "N": "i32", "K": "i32", "part_k": "i32", "FORMAT": kind, "ACTIVATION": "none",
                "WHOLE_K": True, "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k,
            }  # fmt: skip
            if not gemv:
                arguments = insert_before(arguments, "BLOCK_M", "AHEAD", load_ahead(capability))
            name = f"{kind} weight-only {'gemv' if gemv else 'skinny'} {config}"
            kernel, instruction = (gemv_kernel, "") if gemv else (skinny_kernel, dot_instruction(capability, "bf16.bf16"))
            made.append(Build(name, kernel, arguments, config.warps, config.stages, instruction))
        arguments = {
            "w": "*i8" if kind == "int8" else "*u8", "out": "*bf16", "scale": "*fp32", "N": "i32", "K": "i32",
            "FORMAT": kind, "BLOCK_N": 8, "BLOCK_K": 512,
        }  # fmt: skip
        made.append(Build(f"{kind} dequantize", dequantize_kernel, arguments, 4, 3))
    arguments = {
        "parts": "*fp32", **epilogue_types("float"), "scale": "*fp32", "out": "*bf16", "M": "i32", "N": "i32", "SPLIT": 4,
        "ACTIVATION": "none", "BLOCK_M": 4, "BLOCK_N": 256,
    }  # fmt: skip
    made.append(Build("reduce_parts weight-only", reduce_parts_kernel, arguments, 4, 3, wide="parts + "))
    return made
