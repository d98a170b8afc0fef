"""Per-token quantization in one kernel, to int8 with a zero point or to float8_e4m3fn.

References: `fxc_kernels.int8_linear.quantize_rows` and `fxc_kernels.fp8_linear.quantize_rows`. A row of NaN or Inf gets a scale
that is not finite, as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.tile import ROUND, Build, flat_rows, on_device_of_first

# A row of more numbers than this is read twice, the second time from the cache, instead of being kept in registers.
KEPT = 32768
CHUNK = 4096


@triton.jit
def int8_parameters(lo, hi, has_nan):
    """(scale, 1 / scale, zero point as a float) of a row whose smallest and largest numbers are lo <= 0 <= hi."""
    span = tl.where(has_nan > 0, float("nan"), hi - lo)
    scale = tl.where(span <= 1e-30, 1.0, tl.div_rn(span, 255.0))
    inverse = tl.div_rn(1.0, scale)
    return scale, inverse, (-128.0 - lo * inverse + ROUND) - ROUND


@triton.jit
def to_int8(x, inverse, zero):
    # fp_fusion is off for every kernel that calls this: a fused x * inverse + ROUND would round halves differently.
    q = ((x * inverse + ROUND) - ROUND) + zero
    # Clamped as a float, because NaN has no int8: it becomes -128, and the scale says that the row is not finite.
    return tl.minimum(tl.maximum(q, -128.0), 127.0).to(tl.int32).to(tl.int8)


@triton.jit
def fp8_parameters(amax, has_nan):
    amax = tl.where(has_nan > 0, float("nan"), amax)
    scale = tl.where(amax <= 1e-30, 1.0, tl.div_rn(amax, 448.0))
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def to_fp8(x, inverse):
    return tl.minimum(tl.maximum(x * inverse, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def store_quantized(x, inside, at, row, q, scale, zero):
    """Quantize x, one whole row in registers (0 outside), and store it at `at` of q, with the row's parameters. zero is None
    for fp8."""
    has_nan = tl.max((x != x).to(tl.int32), axis=0)
    if zero is None:
        s, inverse = fp8_parameters(tl.max(tl.abs(x), axis=0), has_nan)
        tl.store(q + at, to_fp8(x, inverse), mask=inside)
    else:
        lo = tl.minimum(tl.min(x, axis=0), 0.0)
        s, inverse, z = int8_parameters(lo, tl.maximum(tl.max(x, axis=0), 0.0), has_nan)
        tl.store(q + at, to_int8(x, inverse, z), mask=inside)
        tl.store(zero + row, tl.where(z == z, z, 0.0).to(tl.int32))
    tl.store(scale + row, s)


@triton.jit
def quantize_rows_kernel(x, q, scale, zero, K, BLOCK: tl.constexpr, KEPT_ROW: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = row * K
    if KEPT_ROW:
        inside = columns < K
        values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        store_quantized(values, inside, start + columns, row, q, scale, zero)
    else:
        lo = tl.zeros([BLOCK], tl.float32)
        hi = tl.zeros([BLOCK], tl.float32)
        nans = tl.zeros([BLOCK], tl.int32)
        for first in range(0, K, BLOCK):
            inside = columns < K - first
            values = tl.load(x + start + first + columns, mask=inside, other=0.0).to(tl.float32)
            lo = tl.minimum(lo, values)
            hi = tl.maximum(hi, values)
            nans = nans | (values != values).to(tl.int32)
        has_nan = tl.max(nans, axis=0)
        low = tl.min(lo, axis=0)
        high = tl.max(hi, axis=0)
        if zero is None:
            s, inverse = fp8_parameters(tl.maximum(-low, high), has_nan)
            z = 0.0
        else:
            s, inverse, z = int8_parameters(low, high, has_nan)
            tl.store(zero + row, tl.where(z == z, z, 0.0).to(tl.int32))
        tl.store(scale + row, s)
        for first in range(0, K, BLOCK):
            inside = columns < K - first
            values = tl.load(x + start + first + columns, mask=inside, other=0.0).to(tl.float32)
            if zero is None:
                tl.store(q + start + first + columns, to_fp8(values, inverse), mask=inside)
            else:
                tl.store(q + start + first + columns, to_int8(values, inverse, z), mask=inside)


def row_block(columns: int, kept: int = KEPT) -> tuple[int, int, bool]:
    """(block, warps, is the row kept whole) for rows of `columns` numbers."""
    whole = triton.next_power_of_2(max(columns, 1))
    if whole > kept:
        return CHUNK, 8, False
    return whole, min(max(whole // 1024, 1), 16), True


def empty_quantized(rows: int, columns: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for what `quantize_rows` gives of rows [M, K]."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"rows are quantized to int8 or float8_e4m3fn, not {dtype}")
    q = torch.empty(rows, columns, dtype=dtype, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    return q, scale, torch.empty(rows, dtype=torch.int32, device=device) if dtype == torch.int8 else None


def check_kept(columns: int) -> None:
    """Raises ValueError for rows that a kernel cannot keep whole."""
    if not 0 < columns <= KEPT:
        raise ValueError(f"a row of {columns} numbers does not fit: 1 to {KEPT} are kept in registers")


@on_device_of_first
def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [..., K] float, K > 0 -> (q `dtype` [M, K], scale float32 [M], zero point int32 [M], or None for float8_e4m3fn)."""
    x = flat_rows(x)
    rows, columns = x.shape
    q, scale, zero = empty_quantized(rows, columns, dtype, x.device)
    if rows:
        block, warps, kept = row_block(columns)
        quantize_rows_kernel[(rows,)](
            x, q, scale, zero, columns, BLOCK=block, KEPT_ROW=kept, num_warps=warps, enable_fp_fusion=False
        )
    return q, scale, zero


def builds(capability: int) -> list[Build]:
    made = []
    for kind, pointer in (("int8", "*i8"), ("fp8", "*fp8e4nv")):
        for columns in (3584, 18944, 65536):
            block, warps, kept = row_block(columns)
            arguments = {
                "x": "*bf16", "q": pointer, "scale": "*fp32", "zero": "*i32" if kind == "int8" else None,
                "K": "i32", "BLOCK": block, "KEPT_ROW": kept,
            }  # fmt: skip
            name = f"quantize_rows {kind} K={columns}"
            made.append(Build(name, quantize_rows_kernel, arguments, warps, 3, wide="x + ", fp_fusion=False))
    return made if capability >= 89 else [each for each in made if "fp8" not in each.name]
