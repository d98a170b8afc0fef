"""fxc::int8_weight_only_linear on a CPU: x = s * (q1 + q2 / 254) as 2M int8 rows, relative error 3e-5. The weights are read
once, as int8, and the activations keep 16 bits."""

import torch
from torch import Tensor

from fxc_kernels.cpu.int8_product import UINT8_ZERO, int8_product
from fxc_kernels.cpu.packed_linear import dense_linear
from fxc_kernels.cpu.rows import activated, finished, in_blocks
from fxc_kernels.int8_linear import INT8_MAX, ZERO_ROW

# q2 of the split: the remainder of rounding lies in [-1/2, 1/2], so 254 spreads it over the int8 range.
SPLIT = 254.0


def symmetric_scales(rows: Tensor) -> Tensor:
    """float32 rows [M, K] -> the scale [M, 1] that puts their largest magnitude at 127, or 1 for an all-zero row."""
    scale = rows.abs().amax(dim=-1, keepdim=True)
    zero = scale <= ZERO_ROW
    return scale.div_(INT8_MAX).masked_fill_(zero, 1.0)


def split_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, activation: str = "none",
    dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """The operator, on a weight that is packed."""
    if dense is not None and x.numel() > limit * x.shape[-1]:
        return activated(dense_linear(x, dense, bias), activation)

    def product(rows: Tensor) -> tuple[Tensor, Tensor]:
        count, columns = rows.shape
        row_scale = symmetric_scales(rows)
        scaled = rows * row_scale.reciprocal()
        q = scaled.new_empty(2 * count, columns)
        torch.round(scaled, out=q[:count])
        torch.sub(scaled, q[:count], out=q[count:])
        q[count:].mul_(SPLIT).round_()
        halves = int8_product(q.add_(UINT8_ZERO).to(torch.uint8), weight, scale, zero_point)
        return halves[:count].add_(halves[count:], alpha=1 / SPLIT), row_scale

    return in_blocks(product, x, scale.shape[0], bias, activation)


def split_linear_compiled(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, activation: str = "none",
    dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """The operator, on a weight as it is stored, written for Inductor to fuse."""
    if dense is not None and (x.numel() == 0 or x.numel() > limit * x.shape[-1]):
        return activated(dense_linear(x, dense, bias), activation)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scale = symmetric_scales(rows)
    scaled = rows * row_scale.reciprocal()
    first = scaled.round()
    rest = ((scaled - first) * SPLIT).round()
    q = (torch.cat([first, rest]) + UINT8_ZERO).to(torch.uint8)
    halves = int8_product(q, torch.ops.fxc_cpu.pack_int8(weight), scale, zero_point)
    count = rows.shape[0]
    return finished(halves[:count] + halves[count:] * (1 / SPLIT), row_scale, x, bias, activation)
