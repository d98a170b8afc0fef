"""Packed weights as blocks of ggml, the library of llama.cpp: the same levels, under the scales that its blocks can hold.

    Q8_0   34 bytes for 32 numbers      d: f16, q: i8[32]                             w = d * q
    Q4_0   18 bytes for 32 numbers      d: f16, 16 bytes: q[j] | q[j + 16] << 4       w = d * (q - 8)
    Q4_1   20 bytes for 32 numbers      d: f16, m: f16, 16 bytes as before            w = d * q + m

    int8                                Q8_0, the scale of the row in each block
    int4, int3, int2, symmetric         Q4_0: int3 and int2 have fewer levels about the same middle
    int4, int3, int2 with zero points   Q4_1: m = -d * zero

Levels are never rounded again. Scales are: to float16, which holds every bfloat16 scale from 2^-17 on exactly, and float32 ones
to 2^-11 of themselves. Where the matrix would move by more than `LIMIT` of itself, it has no such blocks.
Formats: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.export.packed import Packed
from fxc.schemes.int4 import unpack

BLOCK = 32
LIMIT = 2**-10


def blocks(each: Packed) -> tuple[str, Tensor] | str:
    """(name of the type, uint8 [N, bytes of a row]) of a packed weight [N, K], or why it has none."""
    if each.scheme.name not in ("int8", "int4", "int3", "int2"):
        return f"ggml has no blocks for {each.scheme.label}"
    rows, columns = each.shape
    if columns % BLOCK:
        return f"its rows of {columns} numbers fill no whole blocks of {BLOCK}"
    numbers, scale = each.parts["qweight"], each.parts["scale"].float()
    if each.scheme.name == "int8":
        d = scale[:, None].expand(rows, columns // BLOCK)
        return _stored("Q8_0", scale, [d], numbers.view(torch.uint8).unflatten(1, (-1, BLOCK)))
    bits, group = int(each.scheme.name[-1]), each.argument("group")
    middle = 1 << bits - 1
    d = scale.repeat_interleave(group // BLOCK, dim=1)
    q, zero = unpack(numbers, bits), each.parts.get("zero")
    if zero is None:
        return _stored("Q4_0", scale, [d], _nibbles(q + (8 - middle)))
    m = -d * zero.repeat_interleave(group // BLOCK, dim=1)
    return _stored("Q4_1", scale, [d, m], _nibbles(q))


def _nibbles(q: Tensor) -> Tensor:
    halves = q.unflatten(1, (-1, 2, BLOCK // 2))
    return halves[:, :, 0] | halves[:, :, 1] << 4


def _stored(kind: str, scale: Tensor, factors: list[Tensor], numbers: Tensor) -> tuple[str, Tensor] | str:
    moved = max(float((f.half().float() - f).norm() / f.norm().clamp(min=1e-30)) for f in factors)
    if not moved <= LIMIT:
        return f"float16 does not hold its scales (from {float(scale.abs().min()):.1e} to {float(scale.abs().max()):.1e})"
    heads = [f.half().contiguous().view(torch.uint8).unflatten(1, (-1, 2)) for f in factors]
    return kind, torch.cat([*heads, numbers], dim=-1).flatten(1).contiguous()
