"""Products with 2:4 sparse weights that were prepacked for sparse tensor cores (`fxc_kernels.cuda.sparse24_prepacked`).

    rows (tokens)
    up to 64         mma.sp: `fxc_kernels.cuda.sparse24_mma`, which saves the weight's bytes and its products
    more             the dense matrix is made, then torch's own product, or `fxc_kernels.cuda.scaled_mm` for int8

References: `fxc_kernels.sparse24_linear.sparse24_linear_reference` and `int8_sparse24_linear_reference`. Where a
row of x holds Inf or NaN, what it gives is not finite where the weight stores something for that column, and perhaps elsewhere.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda import many_rows, quantize_rows, scaled_mm, sparse24_mma
from fxc_kernels.cuda.dispatch import SKINNY_ROWS, config_for
from fxc_kernels.cuda.sparse24 import dense_tile
from fxc_kernels.cuda.sparse24_prepacked import Prepacked, row_sums
from fxc_kernels.cuda.tile import (
    Build,
    Config,
    check_vectors,
    on_device_of_first,
    output_columns,
)

# Tiles that one program of `prepacked_dense_kernel` makes dense: 512 bytes of a bfloat16 row.
DENSE_TILES = 4


@triton.jit
def prepacked_dense_kernel(w, meta, out, N, K, across, ITEMSIZE: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles of 16 rows and 64 columns; `fxc_kernels.cuda.sparse24_prepacked` has the orders that are undone here."""
    first = tl.program_id(0).to(tl.int64) * across + tl.program_id(1) * TILES
    left = across - tl.program_id(1) * TILES
    count = tl.arange(0, TILES * 512)
    values = tl.load(w + first * 512 + count, mask=count < left * 512, other=0)
    lanes = tl.arange(0, TILES * 32)
    words = tl.load(meta + first * 32 + lanes, mask=lanes < left * 32, other=0)
    nibbles = (words[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15
    if ITEMSIZE == 2:
        # Values by step, g, t, half of the step's groups, row half, first or second; places by g, step, half, row half, t.
        values = tl.permute(tl.reshape(values, (TILES, 2, 8, 4, 2, 2, 2)), (5, 2, 0, 1, 4, 3, 6))
        nibbles = tl.permute(tl.reshape(nibbles, (TILES, 8, 2, 2, 2, 4)), (4, 1, 0, 2, 3, 5))
    else:
        # The instruction's group is 8 q + 2 t + p, the row's 4 (t % 2 * 2 + p) + 2 q + t // 2.
        values = tl.permute(tl.reshape(values, (TILES, 8, 2, 2, 2, 2, 2, 2)), (5, 1, 0, 3, 6, 4, 2, 7))
        nibbles = tl.permute(tl.reshape(nibbles, (TILES, 8, 2, 2, 2, 2, 2)), (3, 1, 0, 5, 6, 2, 4))
    tile = dense_tile(tl.reshape(values, (16, TILES * 32)), tl.reshape(nibbles, (16, TILES * 16)), 16, TILES * 16)
    rn = tl.program_id(0) * 16 + tl.arange(0, 16)
    rk = tl.program_id(1) * TILES * 64 + tl.arange(0, TILES * 64)
    tl.store(out + rn.to(tl.int64)[:, None] * K + rk[None, :], tile, mask=(rn < N)[:, None] & (rk < K)[None, :])


def dense_from_prepacked(weight: Prepacked) -> Tensor:
    """The matrix [N, K]."""
    out = torch.empty(weight.outputs, weight.columns, dtype=weight.values.dtype, device=weight.values.device)
    if out.numel():
        down, across, _ = weight.values.shape
        with torch.cuda.device_of(out):
            prepacked_dense_kernel[(down, triton.cdiv(across, DENSE_TILES))](
                weight.values, weight.meta, out, weight.outputs, weight.columns, across,
                ITEMSIZE=out.itemsize, TILES=DENSE_TILES,
            )  # fmt: skip
    return out


@on_device_of_first
def prepacked_linear(
    x: Tensor, weight: Prepacked, bias: Tensor | None = None, *,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`sparse24_linear_reference` of what was prepacked, then `activation`: x [..., K] of the values' dtype -> [..., N].

    A given config also decides the kernel: mma.sp. Raises TypeError for another dtype of x, ValueError for shapes that do not
    fit.
    """
    if x.dtype != weight.values.dtype or not x.is_floating_point():
        raise TypeError(f"x must be of the prepacked values' dtype, bfloat16 or float16: {x.dtype}, {weight.values.dtype}")
    _check_prepacked(x, weight, bias=bias)

    def kernel(flat: Tensor, out: Tensor) -> None:
        chosen = config or config_for("sparse24", flat, weight.outputs, weight.columns, sparse24_mma.CONFIGS)
        sparse24_mma.multiply(flat, weight, out, (None, None, None, None, bias), activation, chosen)

    dense = partial(dense_from_prepacked, weight)
    return many_rows.linear(x, weight.outputs, bias, activation, config, SKINNY_ROWS, dense, kernel)


@on_device_of_first
def prepacked_scaled_mm(
    q: Tensor, row_scale: Tensor, zero: Tensor | None, weight: Prepacked, scale: Tensor, bias: Tensor | None = None, *,
    column_sum: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, activation: str = "none",
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`fxc_kernels.cuda.scaled_mm.scaled_mm` with a prepacked int8 weight: q int8 [M, K], row_scale float32 [M], zero int32
    [M] or None, scale float32 [N], column_sum int32 [N]: the sums of the weight's rows, which `zero` needs -> `dtype` [M, N].

    config and errors as for `prepacked_linear`.
    """
    if q.dtype != torch.int8 or weight.values.dtype != torch.int8:
        raise TypeError(f"rows and prepacked values must be int8, not {q.dtype} and {weight.values.dtype}")
    _check_prepacked(q, weight, scale=scale, bias=bias, column_sum=column_sum)
    check_vectors(q.shape[0], row_scale=row_scale, zero=zero)
    if q.dim() != 2 or not q.is_contiguous():
        raise ValueError(f"rows {tuple(q.shape)} must be contiguous [M, K]")
    if weight.columns > scaled_mm.INT32_COLUMNS:
        raise ValueError(f"K = {weight.columns} is more than {scaled_mm.INT32_COLUMNS}: int32 sums can overflow")
    if zero is not None and column_sum is None:
        column_sum = row_sums(weight)
    epilogue = (row_scale, zero, scale, column_sum, bias)
    out = torch.empty(q.shape[0], output_columns(weight.outputs, activation), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if config is None and q.shape[0] > SKINNY_ROWS:
        return scaled_mm.scaled_mm(
            q, row_scale, zero, dense_from_prepacked(weight), scale, bias,
            column_sum=column_sum, dtype=dtype, activation=activation,
        )  # fmt: skip
    config = config or config_for("int8_sparse24", q, weight.outputs, weight.columns, sparse24_mma.INT8_CONFIGS)
    sparse24_mma.multiply(q, weight, out, epilogue, activation, config)
    return out


def int8_prepacked_linear(
    x: Tensor, weight: Prepacked, scale: Tensor, bias: Tensor | None = None, *, column_sum: Tensor | None = None,
    activation: str = "none", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """`int8_sparse24_linear_reference` of what was prepacked, then `activation`: x float [..., K] -> x's dtype [..., N]."""
    q, row_scale, zero = quantize_rows.quantize_rows(x)
    out = prepacked_scaled_mm(
        q, row_scale, zero, weight, scale, bias, column_sum=column_sum, dtype=x.dtype,
        activation=activation, config=config,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _check_prepacked(x: Tensor, weight: Prepacked, **vectors: Tensor | None) -> None:
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x {tuple(x.shape)} and a prepacked [{weight.outputs}, {weight.columns}] do not fit")
    check_vectors(weight.outputs, **vectors)


def builds(capability: int) -> list[Build]:
    made = []
    for kind, pointer in (("bf16", "*bf16"), ("int8", "*i8")):
        arguments = {
            "w": pointer, "meta": "*i32", "out": pointer, "N": "i32", "K": "i32", "across": "i32",
            "ITEMSIZE": 1 if kind == "int8" else 2, "TILES": DENSE_TILES,
        }  # fmt: skip
        made.append(Build(f"2:4 {kind} dense, prepacked", prepacked_dense_kernel, arguments, 4, 3))
    return made
