"""2:4 sparse weights in the order that the registers of sparse tensor cores want: prepacked, without a change of any number.

The instruction is mma.sp with the weight as its sparse operand A. Its registers are those of the PTX ISA, "Matrix fragments for
multiply-accumulate operation with sparse matrix A": m16n8k32 with .f16 and .bf16, m16n8k64 with .s8;
tests/helpers/mma_emulation.py has them number by number. `fxc_kernels.cuda.sparse24_mma` is the kernel.

A tile is 16 rows of 64 columns: 512 stored values in 256 groups of four. Prepacked, with g = lane // 4 and t = lane % 4:

    values, 16 bits      lane 0             lane 1      ...  lane 31            each lane reads 16 bytes at once: four registers
      columns 0..31      A0 A1 A2 A3        A0 A1 A2 A3      A0 A1 A2 A3        of two values, a whole group of four in each
      columns 32..63     A0 A1 A2 A3        A0 A1 A2 A3      A0 A1 A2 A3
                         |  |  |  row g + 8, group t + 4 (of 8)
                         |  |  row g,        group t + 4
                         |  row g + 8,       group t
                         row g,              group t
    values, 8 bits
      columns 0..63      A0 A1 A2 A3        A0 A1 A2 A3      A0 A1 A2 A3        four values in a register: two groups, which the
                         |  |  |  row g + 8, groups 2t + 8 and 2t + 9 (of 16)   instruction counts otherwise, see below
                         |  |  row g,        groups 2t + 8 and 2t + 9
                         |  row g + 8,       groups 2t and 2t + 1
                         row g,              groups 2t and 2t + 1

    meta, one word of eight groups a lane; a group's places are four bits, as in fxc/schemes/sparse24.py
      16 bits            t = 0, 1: columns 0..31;  t = 2, 3: columns 32..63        the sparsity selector says which lanes an
                         bits 0..15:  row g,     groups 4 (t % 2) .. + 3           instruction reads, so that one word serves
                         bits 16..31: row g + 8, the same groups                   two instructions: 1.125 bytes a weight
      8 bits             row g + 8 (t % 2), groups 8 (t // 2) .. + 7               0.625 bytes a weight

Which columns the instruction's groups are is free, as long as groups stay groups: the same order in x changes no product. With
8 bits a lane holds whole groups of x, so group 4 a + b of a row is made the instruction's 4 b + a: four groups of a lane are
neighbours in x then, which is read 16 bytes at once too. With 16 bits a group of x is always in two lanes, two numbers in each,
so that no order gives a lane more than 4 bytes in a row, and none is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxc_kernels.sparse24_linear import unpack_positions

ROWS, COLUMNS = 16, 64
"""A tile of the weight."""
VALUES, GROUPS = ROWS * COLUMNS // 2, ROWS * COLUMNS // 4
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "s8"}
"""The dtypes that sparse tensor cores multiply here, and what the instruction calls them."""


def _value_order(itemsize: int) -> Tensor:
    """int64 [512]: of each stored value of a prepacked tile, where it is among the tile's 16 rows of 32 values."""
    number = torch.arange(VALUES)
    if itemsize == 2:
        step, lane, i = number // 256, number // 8 % 32, number % 8
        row = lane // 4 + 8 * (i // 2 % 2)
        group = 8 * step + lane % 4 + 4 * (i // 4)
    else:
        lane, i = number // 16, number % 16
        row = lane // 4 + 8 * (i // 4 % 2)
        group = _column_group(2 * (lane % 4) + i % 4 // 2 + 8 * (i // 8))
    return row * (COLUMNS // 2) + 2 * group + i % 2


def _meta_order(itemsize: int) -> Tensor:
    """int64 [256]: of each group's four bits in a prepacked tile, lowest bits first, where its group is among 16 rows of 16."""
    number = torch.arange(GROUPS)
    lane, i = number // 8, number % 8
    quad, t = lane // 4, lane % 4
    if itemsize == 2:
        row, group = quad + 8 * (i // 4), 8 * (t // 2) + 4 * (t % 2) + i % 4
    else:
        row, group = quad + 8 * (t % 2), _column_group(8 * (t // 2) + i)
    return row * (COLUMNS // 4) + group


def _column_group(group):
    """Which group of a row's 16 the instruction's `group` is, 8 bits a number."""
    return 4 * (group % 4) + group // 4


@dataclass(frozen=True)
class Prepacked:
    """A 2:4 weight [outputs, columns] as `sparse24_mma` reads it.

    values: [N/16, K/64, 512] of the portable form's dtype; meta: int32 [N/16, K/64, 32]; N and K rounded up, with zeros.
    """

    values: Tensor
    meta: Tensor
    outputs: int
    columns: int

    def __post_init__(self) -> None:
        tiles = (-(-self.outputs // ROWS), -(-self.columns // COLUMNS))
        if tuple(self.values.shape) != (*tiles, VALUES) or tuple(self.meta.shape) != (*tiles, 32):
            raise ValueError(
                f"values {tuple(self.values.shape)} and meta {tuple(self.meta.shape)} are not the {tiles} tiles of a prepacked "
                f"[{self.outputs}, {self.columns}]"
            )
        if self.values.dtype not in KINDS or self.meta.dtype != torch.int32:
            raise TypeError(f"values must be bfloat16, float16 or int8 and meta int32: {self.values.dtype}, {self.meta.dtype}")
        if not self.values.is_contiguous() or not self.meta.is_contiguous():
            raise ValueError("values and meta must be contiguous")


def prepack(values: Tensor, meta: Tensor) -> Prepacked:
    """values bfloat16, float16 or int8 [N, K/2] and meta uint8 [N, K/8], as `fxc.schemes.sparse24.pack` makes them.

    Exact: `unpack` undoes it. Raises TypeError for another dtype (float32 has no sparse product: it stays as it is), ValueError
    where the places in a group do not ascend.
    """
    if values.dtype not in KINDS:
        raise TypeError(f"sparse tensor cores multiply bfloat16, float16 and int8 here, not {values.dtype}")
    outputs, columns = values.shape[0], 2 * values.shape[1]
    places = unpack_positions(meta)
    if tuple(places.shape) != (outputs, columns // 4, 2) or columns % 8 or not columns:
        shapes = f"values {tuple(values.shape)} and meta {tuple(meta.shape)}"
        raise ValueError(f"{shapes} must be [N, K/2] and [N, K/8] of one K above 0")
    if not (places[..., 0] < places[..., 1]).all():
        raise ValueError("the two places in a group of four must ascend: pack with fxc.schemes.sparse24.pack")
    codes = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    ordered = _tiles(values, COLUMNS // 2, 0)[..., _value_order(values.itemsize).to(values.device)]
    # Groups that are only there to fill a tile need places that ascend too: 0 and 1.
    codes = _tiles(codes, COLUMNS // 4, 0b0100)[..., _meta_order(values.itemsize).to(meta.device)]
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous().view(torch.int32)
    return Prepacked(ordered, packed, outputs, columns)


def unpack(weight: Prepacked) -> tuple[Tensor, Tensor]:
    """The portable values [N, K/2] and meta uint8 [N, K/8] that `prepack` was given."""
    itemsize, device = weight.values.itemsize, weight.values.device
    back = _value_order(itemsize).argsort().to(device)
    values = _rows(weight.values[..., back], COLUMNS // 2)[: weight.outputs, : weight.columns // 2]
    raw = weight.meta.view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2)[..., _meta_order(itemsize).argsort().to(device)]
    codes = _rows(codes, COLUMNS // 4)[: weight.outputs, : weight.columns // 4]
    return values.contiguous(), (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous()


def row_sums(weight: Prepacked) -> Tensor:
    """int32 [N]: the sums of an int8 weight's rows."""
    down, across, _ = weight.values.shape
    # Values of a lane's two rows take turns of four: g, t, two pairs of groups, row g and row g + 8.
    lanes = weight.values.reshape(down, across, 8, 4, 2, 2, 4).sum(dim=(1, 3, 4, 6), dtype=torch.int32)
    return lanes.transpose(1, 2).flatten()[: weight.outputs]


def _tiles(matrix: Tensor, columns: int, fill: int) -> Tensor:
    """[N, C] -> [N/16, C/columns, 16 * columns], filled up."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % ROWS)
    full = torch.nn.functional.pad(matrix, missing, value=fill)
    return full.reshape(full.shape[0] // ROWS, ROWS, full.shape[1] // columns, columns).transpose(1, 2).flatten(2)


def _rows(tiles: Tensor, columns: int) -> Tensor:
    """The inverse of `_tiles`, but for what it filled up."""
    down, across = tiles.shape[:2]
    return tiles.reshape(down, across, ROWS, columns).transpose(1, 2).reshape(down * ROWS, across * columns)
