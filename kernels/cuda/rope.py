"""Rotary position embedding of queries or keys in one kernel instead of seven.

    out = x * cos + rotate_half(x) * sin        rotate_half(x) = [-second half, first half]

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", in the half-split form that Llama's models use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.tile import Build, on_device_of_first

HEADS = 8
"""Heads of one token that a program turns."""


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], cos and sin [B or 1, 1, S, D], all of one dtype -> [B, H, S, D], rounded after every operation."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@triton.jit
def rope_kernel(
    x, cos, sin, out, H, S, x_batch, x_head, x_token, c_batch, c_token, s_batch, s_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) % S
    batch = tl.program_id(0) // S
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, WIDTH)
    dtype: tl.constexpr = x.dtype.element_ty
    inside = (heads < H)[:, None] & (columns < HALF)[None, :]
    in_row = (columns < HALF)[None, :]
    at = x + batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token
    at = at + heads.to(tl.int64)[:, None] * x_head + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    c_at = cos + batch.to(tl.int64) * c_batch + token.to(tl.int64) * c_token + columns[None, :]
    s_at = sin + batch.to(tl.int64) * s_batch + token.to(tl.int64) * s_token + columns[None, :]
    cos1 = tl.load(c_at, mask=in_row, other=0.0).to(tl.float32)
    cos2 = tl.load(c_at + HALF, mask=in_row, other=0.0).to(tl.float32)
    sin1 = tl.load(s_at, mask=in_row, other=0.0).to(tl.float32)
    sin2 = tl.load(s_at + HALF, mask=in_row, other=0.0).to(tl.float32)
    turned1 = (first * cos1).to(dtype).to(tl.float32) - (second * sin1).to(dtype).to(tl.float32)
    turned2 = (second * cos2).to(dtype).to(tl.float32) + (first * sin2).to(dtype).to(tl.float32)
    to = out + ((batch.to(tl.int64) * H + heads)[:, None] * S + token) * (2 * HALF) + columns[None, :]
    tl.store(to, turned1.to(dtype), mask=inside)
    tl.store(to + HALF, turned2.to(dtype), mask=inside)


@on_device_of_first
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope_reference` on a GPU, contiguous. x, cos and sin may be views whose last dimension is contiguous."""
    batch, heads, tokens, width = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 4 or table.shape[0] not in (1, batch) or tuple(table.shape[1:]) != (1, tokens, width):
            raise ValueError(f"{name} {tuple(table.shape)} does not fit x {tuple(x.shape)}")
        if table.dtype != x.dtype:
            raise TypeError(f"{name} must be of x's {x.dtype}, not {table.dtype}")
    if width % 2:
        raise ValueError(f"a head of {width} has no halves")
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    out = torch.empty(batch, heads, tokens, width, dtype=x.dtype, device=x.device)
    if out.numel():
        strides = [stride for each in (cos, sin) for stride in (each.stride(0) if each.shape[0] > 1 else 0, each.stride(2))]
        rope_kernel[(batch * tokens, triton.cdiv(heads, HEADS))](
            x, cos, sin, out, heads, tokens, x.stride(0), x.stride(1), x.stride(2), *strides,
            HALF=width // 2, WIDTH=triton.next_power_of_2(width // 2), BLOCK_H=HEADS, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def builds(capability: int) -> list[Build]:
    sizes = ("H", "S", "x_batch", "x_head", "x_token", "c_batch", "c_token", "s_batch", "s_token")
    arguments = {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "out": "*bf16", **dict.fromkeys(sizes, "i32")}
    arguments |= {"HALF": 64, "WIDTH": 64, "BLOCK_H": HEADS}
    return [Build("rope D=128", rope_kernel, arguments, 2, 3, wide="at", fp_fusion=False)]
