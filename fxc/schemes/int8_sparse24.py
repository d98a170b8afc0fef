"""2:4 sparse weights whose numbers are int8, one scale per output channel: `fxc.schemes.int8` of `fxc.schemes.sparse24`.

The op that uses them is in fxc_kernels.sparse24_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.schemes import int8, sparse24
from fxc.schemes.scheme import Product, Scheme, register

LINEAR = torch.ops.fxc.int8_sparse24_linear.default


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K] (any float dtype) -> (int8 [N, K/2], places uint8 [N, K/8], scale float32 [N]): the two of each four
    neighbours that are larger in magnitude, rounded. Raises InputRefused as the two formats do."""
    values, meta = sparse24.pack(sparse24.mask_by_magnitude(weight))
    qweight, scale = int8.quantize_weight(values)
    return qweight, meta, scale


def dequantize(qweight: Tensor, meta: Tensor, scale: Tensor) -> Tensor:
    """The weight [N, K], float32, zeros included."""
    return int8.dequantize(sparse24.unpack(qweight, meta), scale)


SCHEME = register(
    Scheme(
        name="int8_sparse24",
        label="int8 2:4 sparse",
        parts={"qweight": None, "meta": "2:4 places", "scale": "scales"},
        products=(Product(LINEAR, "int8_sparse24", "int8 2:4 linear", activations=torch.int8, rounded=int8.rounded_rows),),
        quantize=quantize_weight,
        dequantize=dequantize,
        multiple=sparse24.SCHEME.multiple,
        is_sparse=True,
        levels=int8.levels,
        stored=lambda levels, parts: sparse24.at_places(levels, parts["meta"]).to(torch.int8),
    )
)
