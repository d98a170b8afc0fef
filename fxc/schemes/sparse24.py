"""2:4 sparse weights: of every four neighbours along K two are stored, and where they stood.

    row n of the weight             0.5   0    0   -2  |   0    1    0    0  |  ...
    place among the four             0    1    2    3  |   0    1    2    3
                                     *              *  |   *    *                       stored: two of each four
    values  [N, K/2]                0.5  -2            |   0    1            |  ...     in order

    meta    uint8 [N, K/8]                 bit   7 6   5 4   3 2   1 0
                                                [1]   [0]   [3]   [0]                   places, lowest bits first:
                                                 second 4    first 4                    one byte for eight numbers of a row

Where fewer than two of a four are not zero, zeros fill up: the first that are left, as above. Places ascend within a four.
The ops that use them are in fxc_kernels.sparse24_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.errors import InputRefused
from fxc.schemes.checks import check_weight
from fxc.schemes.scheme import Product, Scheme, register
from fxc_kernels.sparse24_linear import BYTE, unpack, unpack_positions

__all__ = ["BYTE", "LINEAR", "SCHEME", "at_places", "mask_by_magnitude", "pack", "unpack", "unpack_positions"]

LINEAR = torch.ops.fxc.sparse24_linear.default


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [N, K] of any dtype, 8 a divisor of K -> (values [N, K/2], meta uint8 [N, K/8]). `unpack` undoes it.

    Raises InputRefused for another K, or where more than two of four are not zero.
    """
    _check_rows(matrix)
    fours = matrix.unflatten(1, (-1, 4))
    used = fours != 0
    if (crowded := used.sum(-1) > 2).any():
        raise InputRefused(
            "more than two of four neighbours are not zero", why=f"in {int(crowded.sum())} of {crowded.numel()} fours"
        )
    # Those that are not zero first, in order, and zeros after them: two of all, in order again.
    positions = (~used).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
    values = fours.gather(-1, positions).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=matrix.device)
    places = positions.to(torch.uint8).reshape(matrix.shape[0], matrix.shape[1] // BYTE, 4)
    return values, (places << shifts).sum(-1, dtype=torch.uint8)


def at_places(matrix: Tensor, meta: Tensor) -> Tensor:
    """Of a matrix [N, K] the numbers at the places that `meta` uint8 [N, K/8] tells, [N, K/2]."""
    return matrix.unflatten(1, (-1, 4)).gather(-1, unpack_positions(meta)).flatten(1)


def mask_by_magnitude(weight: Tensor) -> Tensor:
    """`weight` [N, K] with the two of each four neighbours that are smaller in magnitude set to zero; of equals, the later.

    Raises InputRefused when the weight is not a float matrix, holds NaN or Inf, or when 8 does not divide K.
    """
    check_weight(weight, "2:4 sparse")
    _check_rows(weight)
    fours = weight.detach().unflatten(1, (-1, 4))
    smaller = fours.abs().sort(dim=-1, descending=True, stable=True).indices[..., 2:]
    return fours.scatter(-1, smaller, 0).flatten(1)


def _check_rows(matrix: Tensor) -> None:
    if matrix.dim() != 2 or matrix.shape[1] % BYTE:
        raise InputRefused(
            "2:4 needs a matrix with rows of a multiple of 8",
            why=f"this one is {list(matrix.shape)}; groups are of four, and a byte holds the positions of two groups",
        )


SCHEME = register(
    Scheme(
        name="sparse24",
        label="2:4 sparse",
        parts={"values": None, "meta": "2:4 places"},
        products=(Product(LINEAR, "sparse24", "2:4 linear"),),
        quantize=lambda weight: pack(mask_by_magnitude(weight)),
        dequantize=unpack,
        multiple=lambda: (BYTE, "two groups of four, whose positions share a byte"),
        is_quantized=False,
        is_sparse=True,
    )
)
