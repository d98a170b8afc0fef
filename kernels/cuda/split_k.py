"""Products whose K is cut into parts, so that every multiprocessor has weights to read where N is small.

Each program leaves the sums of its part in a workspace [parts, M, N], and a second kernel adds them in order: the result is
the same every time. Adding them in the last program that finishes would save that launch, but needs counters in memory that are
zero before and after, and two graphs that replay at once would share them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.tile import finish


def part_length(columns: int, tile: int, split: int) -> tuple[int, int]:
    """(columns of one part, parts) for at most `split` parts: whole tiles of K, and no part is empty."""
    length = triton.cdiv(triton.cdiv(columns, tile), split) * tile
    return length, max(triton.cdiv(columns, length), 1)


def workspace(split: int, out: Tensor, outputs: int, integers: bool = False) -> Tensor | None:
    """For the sums of `split` parts of a product [M, outputs], float32 or int32; None where there is one part."""
    dtype = torch.int32 if integers else torch.float32
    return torch.empty(split, out.shape[0], outputs, dtype=dtype, device=out.device) if split > 1 else None


@triton.jit
def finish_part(
    result, rm, rn, part, M, N, out, parts, row_scale, zero, scale, column_sum, bias, ACTIVATION: tl.constexpr
):  # fmt: skip
    """`finish` where parts is None, else result goes to parts [SPLIT, M, N]."""
    if parts is None:
        finish(result, rm, rn, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)
    else:
        where = (part * M + rm).to(tl.int64)[:, None] * N + rn[None, :]
        tl.store(parts + where, result, mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def reduce_parts_kernel(
    parts, row_scale, zero, scale, column_sum, bias, out, M, N,
    SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts [SPLIT, M, N], added in order, so that the sum is the same every time; then the epilogue."""
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    where = rm.to(tl.int64)[:, None] * N + rn[None, :]
    acc = tl.load(parts + where, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT):
        at = (rm.to(tl.int64) + part * M)[:, None] * N + rn[None, :]
        acc += tl.load(parts + at, mask=inside, other=0)
    finish(acc, rm, rn, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)


def reduce_parts(parts: Tensor | None, out: Tensor, row_scale, zero, scale, column_sum, bias, activation: str) -> None:
    """Fill out [M, N] from parts, unless there are none."""
    if parts is None:
        return
    split, rows, columns = parts.shape
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, 256))
    reduce_parts_kernel[grid](
        parts, row_scale, zero, scale, column_sum, bias, out, rows, columns,
        SPLIT=split, ACTIVATION=activation, BLOCK_M=4, BLOCK_N=256,
    )  # fmt: skip
