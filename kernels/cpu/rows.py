"""What the linear operators of a CPU share: rows in blocks that stay in the cache, the activation behind a product, the end of
a compiled one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardswish, relu, relu6, silu

# Rows are gone through in blocks of this many: oneDNN wants hundreds at a time, and temporaries of thousands leave the cache.
BLOCK_ROWS = 512
# A temporary of a block has no more bytes than this, unless that would be fewer than SMALLEST_BLOCK rows.
BLOCK_BYTES = 1 << 24
SMALLEST_BLOCK = 128

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "silu": silu,
    "relu": relu,
    "relu6": relu6,
    "hardswish": hardswish,
}


def activated(x: Tensor, activation: str) -> Tensor:
    """x after one of ACTIVATIONS, or "none"."""
    return x if activation == "none" else ACTIVATIONS[activation](x)


def in_blocks(
    product_of: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, outputs: int, bias: Tensor | None, activation: str
) -> Tensor:
    """activation(product * row scale + bias) in float32, [..., outputs] in x's dtype, one block of rows after another.

    product_of: float32 rows [M, K], M > 0 -> (float32 [M, outputs], row scale [M, 1]); bias: float32.
    """
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    count = rows.shape[0]
    out = x.new_empty(count, outputs)
    size = min(max(SMALLEST_BLOCK, BLOCK_BYTES // (4 * max(columns, outputs))), BLOCK_ROWS)
    for start in range(0, count, size):
        product, scale = product_of(rows[start : start + size].float())
        block = out[start : start + size]
        last = block if activation == "none" else product
        if bias is None:
            torch.mul(product, scale, out=last)
        else:
            torch.addcmul(bias, product, scale, out=last)
        if activation != "none":
            block.copy_(ACTIVATIONS[activation](product))
    return out.view(*x.shape[:-1], outputs)


def finished(out: Tensor, row_scale: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What `in_blocks` ends with, for a compiler: out float32 [M, N] -> [..., N] in x's dtype."""
    out = out * row_scale
    if bias is not None:
        out = out + bias.float()
    return activated(out, activation).to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])
