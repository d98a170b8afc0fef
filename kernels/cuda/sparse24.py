"""Products with 2:4 sparse weights that become dense tiles in registers: the weight's bytes are saved, its products are not.

References: `fxc_kernels.sparse24_linear.sparse24_linear_reference` and `int8_sparse24_linear_reference`. For up to 64 rows
(tokens), where bytes are what a product costs, the dense tile of out^T = W x^T is made from the stored values and their
positions right before tensor cores read it. Beyond, the dense matrix is made once: torch's own product takes it, or
`scaled_mm` for int8. `fxc_kernels.cuda.sparse24_prepacked_linear` saves the products too; float32 is only here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda import many_rows, quantize_rows, scaled_mm
from fxc_kernels.cuda.dispatch import SKINNY_ROWS
from fxc_kernels.cuda.split_k import finish_part, part_length, reduce_parts, workspace
from fxc_kernels.cuda.tile import (
    Build,
    Config,
    capability_of,
    check_vectors,
    choose,
    dot_floats,
    dot_instruction,
    epilogue_types,
    on_device_of_first,
    output_columns,
    processors_of,
)

# Compiled without spills; not yet measured by this project.
CONFIGS = {
    80: (
        Config(16, 16, 64, 128, 4, 3, split=4),
        Config(32, 32, 64, 64, 4, 3, split=4),
        Config(64, 64, 64, 128, 8, 3, split=2),
    ),
}


@triton.jit
def dense_tile(values, positions, rows: tl.constexpr, fours: tl.constexpr):
    """values [rows, 2 fours] and positions [rows, fours], of each four the first's place in bits 0 and 1 and the second's in
    bits 2 and 3 -> [rows, 4 fours]. The two places have to differ, as they do in what `fxc.schemes.sparse24` packs."""
    first, second = tl.split(tl.reshape(values, (rows, fours, 2)))
    at_first = positions & 3
    at_second = (positions >> 2) & 3
    nothing = tl.zeros_like(first)
    d0 = tl.where(at_first == 0, first, tl.where(at_second == 0, second, nothing))
    d1 = tl.where(at_first == 1, first, tl.where(at_second == 1, second, nothing))
    d2 = tl.where(at_first == 2, first, tl.where(at_second == 2, second, nothing))
    d3 = tl.where(at_first == 3, first, tl.where(at_second == 3, second, nothing))
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (rows, 4 * fours))


@triton.jit
def both_halves(meta, rows: tl.constexpr, count: tl.constexpr):
    """[rows, count] bytes -> [rows, 2 count]: the positions of two fours are in each byte, the first in its low half."""
    return tl.reshape(tl.join(meta & 15, meta >> 4), (rows, 2 * count))


@triton.jit
def sparse24_skinny_kernel(
    x, w, meta, out, parts, row_scale, zero, scale, column_sum, bias, M, N, K, value_row, meta_row, part_k,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    start = part * part_k
    left = tl.minimum(part_k, K - start)
    rk = tl.arange(0, BLOCK_K)
    rv = tl.arange(0, BLOCK_K // 2)
    rb = tl.arange(0, BLOCK_K // 8)
    row_n = tl.minimum(rn, N - 1).to(tl.int64)[:, None]
    x_at = x + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + (start + rk)[None, :]
    # value_row and meta_row are K // 2 and K // 8, given so that the compiler knows when rows are aligned.
    # part_k is whole tiles.
    w_at = w + row_n * value_row + (part * (part_k // 32 * 16) + rv)[None, :]
    m_at = meta + row_n * meta_row + (start // 8 + rb)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    # Weights are loaded one tile ahead, 128 bits at a time: where the load and its use are in one turn, the compiler gives the
    # load the layout of its use, and loads fewer bits.
    part_values = part_k // 32 * 16
    left_values = tl.minimum(part_values, value_row - part * part_values)
    left_bytes = meta_row - start // 8
    following = tl.load(w_at, mask=(rv < left_values)[None, :], other=0)
    for k in range(0, left, BLOCK_K):
        tokens = tl.load(x_at + k, mask=(rk < left - k)[None, :], other=0)
        values = following
        following = tl.load(w_at + BLOCK_K // 2 + k // 2, mask=(rv < left_values - k // 2 - BLOCK_K // 2)[None, :], other=0)
        packed = tl.load(m_at + k // 8, mask=(rb < left_bytes - k // 8)[None, :], other=0)
        tile = dense_tile(values, both_halves(packed, BLOCK_N, BLOCK_K // 8), BLOCK_N, BLOCK_K // 4)
        if scale is None:
            acc = dot_floats(tile, tl.trans(tokens), acc)
        else:
            acc = tl.dot(tile, tl.trans(tokens), acc, out_dtype=tl.int32)
    finish_part(
        tl.trans(acc), rm, rn, part, M, N, out, parts, row_scale, zero, scale, column_sum, bias, ACTIVATION
    )  # fmt: skip


@triton.jit
def sparse24_dense_kernel(w, meta, out, N, K, value_row, meta_row, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    row_n = tl.minimum(rn, N - 1).to(tl.int64)[:, None]
    rk = start + tl.arange(0, BLOCK_K)
    rv = start // 2 + tl.arange(0, BLOCK_K // 2)
    rb = start // 8 + tl.arange(0, BLOCK_K // 8)
    values = tl.load(w + row_n * value_row + rv[None, :], mask=(rv < value_row)[None, :], other=0)
    packed = tl.load(meta + row_n * meta_row + rb[None, :], mask=(rb < meta_row)[None, :], other=0)
    tile = dense_tile(values, both_halves(packed, BLOCK_N, BLOCK_K // 8), BLOCK_N, BLOCK_K // 4)
    tl.store(out + row_n * K + rk[None, :], tile, mask=(rn < N)[:, None] & (rk < K)[None, :])


@on_device_of_first
def dense(values: Tensor, meta: Tensor) -> Tensor:
    """values [N, K/2], meta uint8 [N, K/8] -> the matrix [N, K]."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    out = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    if out.numel():
        grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 256))
        sparse24_dense_kernel[grid](values, meta, out, rows, columns, columns // 2, columns // 8, BLOCK_N=16, BLOCK_K=256)
    return out


def _check(x: Tensor, values: Tensor, meta: Tensor) -> None:
    rows, columns = values.shape[0], 2 * values.shape[1]
    if x.shape[-1] != columns or columns % 8 or tuple(meta.shape) != (rows, columns // 8):
        raise ValueError(f"x {tuple(x.shape)}, values {tuple(values.shape)} and meta {tuple(meta.shape)} do not fit")
    if not values.is_contiguous() or not meta.is_contiguous():
        raise ValueError("values and meta must be contiguous")


def _skinny(flat, values, meta, out, epilogue, acc, activation: str, config: Config | None) -> None:
    """out [M, N] from rows of the values' dtype; epilogue: row_scale, zero, scale, column_sum, bias."""
    (rows, columns), outputs = flat.shape, values.shape[0]
    config = config or choose(CONFIGS, capability_of(flat), rows, outputs, processors_of(flat))
    length, split = part_length(columns, config.k, config.split)
    parts = workspace(split, out, outputs, integers=acc == tl.int32)
    grid = (triton.cdiv(outputs, config.n), triton.cdiv(rows, config.m), split)
    sparse24_skinny_kernel[grid](
        flat, values, meta, out, parts, *epilogue, rows, outputs, columns, columns // 2, columns // 8, length,
        ACC=acc, ACTIVATION=activation, BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    reduce_parts(parts, out, *epilogue, activation)


@on_device_of_first
def sparse24_linear(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, *,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`sparse24_linear_reference` on a GPU, then `activation`."""
    _check(x, values, meta)
    check_vectors(values.shape[0], bias=bias)

    def kernel(flat: Tensor, out: Tensor) -> None:
        _skinny(flat, values, meta, out, (None, None, None, None, bias), tl.float32, activation, config)

    return many_rows.linear(x, values.shape[0], bias, activation, config, SKINNY_ROWS, lambda: dense(values, meta), kernel)


@on_device_of_first
def int8_sparse24_linear(
    x: Tensor, qweight: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    column_sum: Tensor | None = None, activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`int8_sparse24_linear_reference` on a GPU, then `activation`. column_sum int32 [N]: the sums of qweight's rows."""
    _check(x, qweight, meta)
    check_vectors(qweight.shape[0], scale=scale, bias=bias, column_sum=column_sum)
    q, row_scale, zero = quantize_rows.quantize_rows(x)
    if column_sum is None:
        column_sum = qweight.sum(dim=1, dtype=torch.int32)
    if config is None and q.shape[0] > SKINNY_ROWS:
        out = scaled_mm.scaled_mm(
            q, row_scale, zero, dense(qweight, meta), scale, bias,
            column_sum=column_sum, dtype=x.dtype, activation=activation,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], out.shape[-1])
    out = torch.empty(q.shape[0], output_columns(qweight.shape[0], activation), dtype=x.dtype, device=x.device)
    if out.numel():
        _skinny(q, qweight, meta, out, (row_scale, zero, scale, column_sum, bias), tl.int32, activation, config)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def builds(capability: int) -> list[Build]:
    made = []
    for kind, pointer in (("bf16", "*bf16"), ("int8", "*i8")):
        for config in CONFIGS[80]:
            arguments = {
                "x": pointer, "w": pointer, "meta": "*u8", "out": "*bf16",
                "parts": ("*i32" if kind == "int8" else "*fp32") if config.split > 1 else None,
                **epilogue_types("int8" if kind == "int8" else "float"),
                "M": "i32", "N": "i32", "K": "i32", "value_row": "i32", "meta_row": "i32", "part_k": "i32",
                "ACC": tl.int32 if kind == "int8" else tl.float32, "ACTIVATION": "none",
                "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k,
            }  # fmt: skip
            types = "bf16.bf16" if kind == "bf16" else "s8.s8"
            instruction = dot_instruction(capability, types)
            name = f"2:4 {kind} decompress {config}"
            made.append(Build(name, sparse24_skinny_kernel, arguments, config.warps, config.stages, instruction))
        arguments = {
            "w": pointer, "meta": "*u8", "out": pointer, "N": "i32", "K": "i32", "value_row": "i32", "meta_row": "i32",
            "BLOCK_N": 16, "BLOCK_K": 256,
        }  # fmt: skip
        made.append(Build(f"2:4 {kind} dense", sparse24_dense_kernel, arguments, 4, 3))
    return made
