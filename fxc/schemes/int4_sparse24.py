"""2:4 sparse weights whose numbers are int4, in groups along K: `fxc.schemes.int4` of `fxc.schemes.sparse24`, 3 bits a number.

    qweight  uint8 [N, K/4]      of each four neighbours the two that are stored, in order, two in a byte as in int4
    meta     uint8 [N, K/8]      where among the four they stood, as in sparse24
    scale    [N, K/group]        and zero uint8 or none, as in int4: a group counts the columns of the whole row

The op that uses them is in fxc_kernels.int4_sparse24_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.schemes import int4, sparse24
from fxc.schemes.scheme import Product, Scheme, register
from fxc_kernels.int4_sparse24_linear import dequantize

__all__ = ["LINEAR", "SCHEME", "densified", "dequantize", "quantize_weight", "thinned"]

LINEAR = torch.ops.fxc.int4_sparse24_linear.default


def thinned(qweight: Tensor, meta: Tensor) -> Tensor:
    """Of an int4 weight, uint8 [N, K/2], the numbers at the places that `meta` uint8 [N, K/8] tells: uint8 [N, K/4]."""
    fours = int4.unpack(qweight).unflatten(1, (-1, 4))
    stored = fours.gather(-1, sparse24.unpack_positions(meta))
    return stored[..., 0] | stored[..., 1] << int4.BITS


def densified(qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`thinned` undone: uint8 [N, K/2], what stands for 0 where nothing is stored."""
    rows, columns = meta.shape[0], meta.shape[1] * sparse24.BYTE
    if zero is None:
        whole = torch.full((rows, columns), 1 << int4.BITS - 1, dtype=torch.uint8, device=qweight.device)
    else:
        whole = zero.repeat_interleave(columns // scale.shape[1], dim=1)
    stored = int4.unpack(qweight).unflatten(1, (-1, 2))
    return int4.pack(whole.unflatten(1, (-1, 4)).scatter(-1, sparse24.unpack_positions(meta), stored).flatten(1))


def quantize_weight(
    weight: Tensor, group: int, symmetric: bool, full_range: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight [N, K] (any float dtype) -> (qweight, meta, scale, zero or None): the two of each four neighbours that are larger
    in magnitude, rounded as int4 is. Raises InputRefused as the two formats do."""
    sparse = sparse24.mask_by_magnitude(weight)
    _, meta = sparse24.pack(sparse)
    qweight, scale, zero = int4.quantize_weight(sparse, group, symmetric, full_range)
    return thinned(qweight, meta), meta, scale, zero


def _dense(qweight: Tensor, meta: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return dequantize(qweight, meta, scale, zero, 4 * qweight.shape[1] // scale.shape[1])


SCHEME = register(
    Scheme(
        name="int4_sparse24",
        label="int4 2:4 sparse",
        parts={"qweight": None, "meta": "2:4 places", "scale": "scales", "zero": "zero points"},
        products=(Product(LINEAR, "int4_sparse24_g{group}", "int4 2:4 linear"),),
        quantize=quantize_weight,
        dequantize=_dense,
        options=int4.SCHEME.options,
        multiple=int4.SCHEME.multiple,
        is_sparse=True,
        has_signed_scales=True,
        levels=int4.SCHEME.levels,
        stored=lambda levels, parts: thinned(int4.pack(levels.to(torch.uint8)), parts["meta"]),
    )
)
