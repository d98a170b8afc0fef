"""Products of float rows and int4 weights in groups along K.

Reference: `fxc_kernels.int4_linear.int4_weight_only_linear_reference`. The kernels read the weight in an order of their own,
which `prepack` makes once. Of each group of G, byte j holds k = j in its low half and k = j + G/2 in its high half, so
that the halves of neighbouring bytes belong to neighbouring activations:

    byte          0          1     ...   G/2 - 1
    low half      0          1           G/2 - 1
    high half    G/2      G/2 + 1         G - 1

Up to four rows (tokens) CUDA cores multiply in float32, up to 64 tensor cores compute out^T = W x^T group by group, each
group's sum being scaled in float32, and beyond that the weight is turned into a matrix of x's dtype once, for torch's own
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda import many_rows
from fxc_kernels.cuda.dispatch import GEMV_ROWS, config_for
from fxc_kernels.cuda.split_k import part_length, reduce_parts, workspace
from fxc_kernels.cuda.tile import (
    INTERPRETED,
    Build,
    Config,
    capability_of,
    check_vectors,
    dot_floats,
    dot_instruction,
    insert_before,
    on_device_of_first,
)
from fxc_kernels.cuda.weight_only import check_gemv_rows, load_ahead, store_result
from fxc_kernels.int4_linear import GROUPS

# From the literature and compiled without spills; not yet measured by this project. The k of a skinny kernel is the group.
_GEMV = (
    Config(1, 1, 8, 1024, 4, 2, split=2, fill=16),
    Config(2, 2, 8, 1024, 4, 2, split=2, fill=16),
    Config(GEMV_ROWS, 4, 4, 1024, 4, 2, split=2, fill=16),
)
# Small groups have tiles of more rows, so that a thread still loads 16 bytes at a time.
_SKINNY = {
    128: (
        Config(16, 16, 64, 128, 4, 4, split=8, fill=8),
        Config(32, 32, 64, 128, 4, 4, split=4, fill=8),
        Config(64, 64, 64, 128, 4, 3, split=2, fill=8),
    ),
    64: (
        Config(16, 16, 128, 64, 4, 4, split=8, fill=8),
        Config(32, 32, 128, 64, 4, 4, split=4, fill=8),
        Config(64, 64, 128, 64, 8, 4, split=2, fill=8),
    ),
    32: (
        Config(16, 16, 256, 32, 4, 5, split=8, fill=8),
        Config(32, 32, 256, 32, 8, 5, split=8, fill=8),
        Config(64, 64, 256, 32, 8, 5, split=4, fill=8),
    ),
}
CONFIGS = {group: {80: (*_GEMV, *skinny)} for group, skinny in _SKINNY.items()}


def prepack(qweight: Tensor, group: int) -> Tensor:
    """uint8 [N, K/2] in the order of `fxc_kernels.int4_linear` -> uint8 [N, K/2] in this module's order."""
    if group not in GROUPS or 2 * qweight.shape[1] % group:
        raise ValueError(f"a group of {group} is not one of {GROUPS} or does not divide K={2 * qweight.shape[1]}")
    q = torch.stack([qweight & 15, qweight >> 4], dim=-1).reshape(qweight.shape[0], -1, 2, group // 2)
    return (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(qweight.shape).contiguous()


@triton.jit
def nibble(raw, AT: tl.constexpr, zero):
    """The four bits of bytes (as uint32) from bit AT on, minus zero, as float32. Left where they are, under an exponent that
    gives their lowest bit the value 1, they need one logical instruction and no shift."""
    BITS: tl.constexpr = (127 + 23 - AT) << 23
    OFFSET: tl.constexpr = 1 << (23 - AT)
    return ((raw & (15 << AT)) | BITS).to(tl.float32, bitcast=True) - (zero + OFFSET)


@triton.jit
def gemv_step(acc, scale, low, high, x_at, inside, HALF: tl.constexpr):
    """acc [n, c] + scale [n, c] * the products of one chunk: the sums over its numbers stay within a thread."""
    first = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_at + HALF, mask=inside, other=0.0).to(tl.float32)
    return acc + scale * tl.sum(low * first[None, :, :] + high * second[None, :, :], axis=2)


@triton.jit
def int4_gemv_kernel(
    x, w, out, parts, scale, zero, bias, M, N, K, part_k,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sixteen bytes of w, one 128-bit load of a thread, are a chunk of 16 low and 16 high halves."""
    CHUNKS: tl.constexpr = BLOCK_K // 32
    IN_GROUP: tl.constexpr = GROUP // 32
    HALF: tl.constexpr = GROUP // 2
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(rn, N - 1).to(tl.int64)
    part = tl.program_id(1)
    start = part * part_k
    left = tl.minimum(part_k, K - start)
    rc = tl.arange(0, CHUNKS)
    inside_chunk = tl.arange(0, 16)
    # K // 32 * 16 is K // 2, written so that the compiler sees that rows are aligned to 16 bytes.
    w_at = w + start // 32 * 16 + row_n[:, None, None] * (K // 32 * 16) + rc[None, :, None] * 16 + inside_chunk[None, None, :]
    in_groups = row_n[:, None] * (K // GROUP) + start // GROUP + (rc // IN_GROUP)[None, :]
    x0 = x + start + (rc // IN_GROUP * GROUP + rc % IN_GROUP * 16)[:, None] + inside_chunk[None, :]
    # Rows past the end read the last one; what they give is not stored.
    x1 = x0 + tl.minimum(1, M - 1) * K
    x2 = x0 + tl.minimum(2, M - 1) * K
    x3 = x0 + tl.minimum(3, M - 1) * K
    acc0 = tl.zeros((BLOCK_N, CHUNKS), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for k in range(0, left, BLOCK_K):
        inside = rc * 32 < left - k
        raw = tl.load(w_at + k // 2, mask=inside[None, :, None], other=0, eviction_policy="evict_first").to(tl.uint32)
        s = tl.load(scale + in_groups + k // GROUP, mask=inside[None, :], other=0.0).to(tl.float32)
        if zero is None:
            z = tl.full((BLOCK_N, CHUNKS), 8.0, tl.float32)[:, :, None]
        else:
            z = tl.load(zero + in_groups + k // GROUP, mask=inside[None, :], other=0).to(tl.float32)[:, :, None]
        low = nibble(raw, 0, z)
        high = nibble(raw, 4, z)
        acc0 = gemv_step(acc0, s, low, high, x0 + k, inside[:, None], HALF)
        if BLOCK_M > 1:
            acc1 = gemv_step(acc1, s, low, high, x1 + k, inside[:, None], HALF)
        if BLOCK_M > 2:
            acc2 = gemv_step(acc2, s, low, high, x2 + k, inside[:, None], HALF)
            acc3 = gemv_step(acc3, s, low, high, x3 + k, inside[:, None], HALF)
    row = tl.arange(0, 1)
    store_result(tl.sum(acc0, axis=1)[None, :], row, rn, part, M, N, out, parts, None, bias, ACTIVATION)
    if BLOCK_M > 1:
        store_result(tl.sum(acc1, axis=1)[None, :], row + 1, rn, part, M, N, out, parts, None, bias, ACTIVATION)
    if BLOCK_M > 2:
        store_result(tl.sum(acc2, axis=1)[None, :], row + 2, rn, part, M, N, out, parts, None, bias, ACTIVATION)
        store_result(tl.sum(acc3, axis=1)[None, :], row + 3, rn, part, M, N, out, parts, None, bias, ACTIVATION)


@triton.jit
def small_float(q, zero, dtype: tl.constexpr):
    """q 0..15 (uint8) minus zero (float32) as `dtype`, exact: q is put into the lowest bits of 128 (bfloat16) or 1024
    (float16), whose last bit is worth 1."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        value = (q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    elif dtype == tl.float16:
        value = (q.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    else:
        value = (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
    return value


@triton.jit
def int4_skinny_kernel(
    x, w, out, parts, scale, zero, bias, M, N, K, part_k,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """AHEAD: weights are loaded one group ahead into registers, 128 bits at a time, instead of through shared memory."""
    HALF: tl.constexpr = GROUP // 2
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rk = tl.arange(0, HALF)
    part = tl.program_id(2)
    start = part * part_k
    row_n = tl.minimum(rn, N - 1).to(tl.int64)
    x_at = x + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    w_at = w + row_n[:, None] * (K // 32 * 16) + (start // 32 * 16 + rk)[None, :]
    in_groups = row_n * (K // GROUP) + start // GROUP
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    groups = tl.minimum(part_k, K - start) // GROUP
    if AHEAD:
        following = tl.load(w_at, eviction_policy="evict_first")
    for group in range(0, groups):
        if AHEAD:
            raw = following
            following = tl.load(w_at + HALF, mask=group + 1 < groups, other=0, eviction_policy="evict_first")
        else:
            raw = tl.load(w_at)
        low = tl.load(x_at)
        high = tl.load(x_at + HALF)
        s = tl.load(scale + in_groups + group).to(tl.float32)
        if zero is None:
            z = tl.full((BLOCK_N, 1), 8.0, tl.float32)
        else:
            z = tl.load(zero + in_groups + group).to(tl.float32)[:, None]
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sums = dot_floats(small_float(raw & 15, z, x.dtype.element_ty), tl.trans(low), sums)
        sums = dot_floats(small_float(raw >> 4, z, x.dtype.element_ty), tl.trans(high), sums)
        acc += sums * s[:, None]
        x_at += GROUP
        w_at += HALF
    store_result(tl.trans(acc), rm, rn, part, M, N, out, parts, None, bias, ACTIVATION)


@triton.jit
def int4_dequantize_kernel(w, out, scale, zero, N, K, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    HALF: tl.constexpr = GROUP // 2
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rb = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    inside = (rn < N)[:, None] & (rb < K // 32 * 16)[None, :]
    row_n = rn.to(tl.int64)[:, None]
    raw = tl.load(w + row_n * (K // 32 * 16) + rb[None, :], mask=inside, other=0)
    group = row_n * (K // GROUP) + (rb // HALF)[None, :]
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    z = 8.0
    if zero is not None:
        z = tl.load(zero + group, mask=inside, other=0).to(tl.float32)
    at = out + row_n * K + (rb // HALF * GROUP + rb % HALF)[None, :]
    tl.store(at, (small_float(raw & 15, z, tl.float32) * s).to(out.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (small_float(raw >> 4, z, tl.float32) * s).to(out.dtype.element_ty), mask=inside)


@on_device_of_first
def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] as `dtype`, from what `prepack` made; computed in float32."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    if out.numel():
        grid = (triton.cdiv(rows, 8), triton.cdiv(columns, 512))
        int4_dequantize_kernel[grid](packed, out, scale, zero, rows, columns, GROUP=group, BLOCK_N=8, BLOCK_K=512)
    return out


@on_device_of_first
def int4_weight_only_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The reference on a GPU, then `activation`, with `packed` from `prepack`. A given config also decides the kernel."""
    outputs, columns = packed.shape[0], 2 * packed.shape[1]
    if x.shape[-1] != columns or columns % group or group not in GROUPS or not packed.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)}, contiguous weight [{outputs}, {columns}] and group {group} do not fit")
    check_vectors(outputs * (columns // group), scale=scale, zero=zero)
    check_vectors(outputs, bias=bias)

    def dense() -> Tensor:
        return dequantize(packed, scale, zero, group, x.dtype)

    def kernel(flat: Tensor, out: Tensor) -> None:
        _few_rows(flat, packed, scale, zero, bias, group, out, activation, config)

    return many_rows.linear(x, outputs, bias, activation, config, many_rows.weight_only_rows(x.dtype), dense, kernel)


def _few_rows(x, packed, scale, zero, bias, group: int, out: Tensor, activation: str, config: Config | None) -> None:
    """Fill out [M, N] from rows x [M, K] and bytes [N, K/2]."""
    (rows, columns), outputs = x.shape, packed.shape[0]
    config = config or config_for(f"int4_g{group}", x, outputs, columns, CONFIGS[group])
    check_gemv_rows(config, rows)
    gemv = config.m <= GEMV_ROWS
    # A part is whole tiles for the GEMV, whose tile is whole groups, and whole groups for the other.
    tile = max(config.k, group) if gemv else group
    length, split = part_length(columns, tile, config.split)
    parts = workspace(split, out, outputs)
    arguments = (out, parts, scale, zero, bias, rows, outputs, columns, length)
    options = {
        "ACTIVATION": activation, "GROUP": group, "BLOCK_M": config.m, "BLOCK_N": config.n,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    if gemv:
        grid = (triton.cdiv(outputs, config.n), split)
        int4_gemv_kernel[grid](x, packed, *arguments, BLOCK_K=tile, **options)
    else:
        grid = (triton.cdiv(outputs, config.n), triton.cdiv(rows, config.m), split)
        int4_skinny_kernel[grid](x, packed, *arguments, AHEAD=load_ahead(capability_of(x)), **options)
    reduce_parts(parts, out, None, None, None, None, bias, activation)


def builds(capability: int) -> list[Build]:
    made = []
    for group, symmetric in ((128, True), (128, False), (64, False), (32, True)):
        kind = f"int4 g{group} {'symmetric' if symmetric else 'asymmetric'}"
        quantization = {"scale": "*fp32", "zero": None if symmetric else "*u8"}
        for config in CONFIGS[group][80]:
            gemv = config.m <= GEMV_ROWS
            arguments = {
                "x": "*bf16", "w": "*u8", "out": "*bf16", "parts": "*fp32" if config.split > 1 else None,
                **quantization, "bias": "*bf16", "M": "i32", "N": "i32", "K": "i32", "part_k": "i32",
                "ACTIVATION": "none", "GROUP": group, "BLOCK_M": config.m, "BLOCK_N": config.n,
            }  # fmt: skip
            if gemv:
                arguments["BLOCK_K"] = config.k
            else:
                arguments = insert_before(arguments, "BLOCK_M", "AHEAD", load_ahead(capability))
            instruction = "" if gemv else dot_instruction(capability, "bf16.bf16")
            kernel = int4_gemv_kernel if gemv else int4_skinny_kernel
            name = f"{kind} {'gemv' if gemv else 'skinny'} {config}"
            made.append(Build(name, kernel, arguments, config.warps, config.stages, instruction))
        arguments = {"w": "*u8", "out": "*bf16", **quantization, "N": "i32", "K": "i32"}
        arguments |= {"GROUP": group, "BLOCK_N": 8, "BLOCK_K": 512}
        made.append(Build(f"{kind} dequantize", int4_dequantize_kernel, arguments, 4, 3))
    return made
