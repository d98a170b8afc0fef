"""fxc::int8_linear on a CPU: rows quantized as they come, one int8 product, its zero points taken out, row scale and bias."""

import torch
from torch import Tensor

from fxc_kernels.cpu.int8_product import UINT8_ZERO, int8_product
from fxc_kernels.cpu.packed_linear import dense_linear
from fxc_kernels.cpu.rows import activated, finished, in_blocks
from fxc_kernels.int8_linear import INT8_MIN, INT8_STEPS, ZERO_ROW, row_parameters


def zero_point_term(qweight: Tensor, scale: Tensor) -> Tensor:
    """-scale * colsum, float32 [1, N]: times a row's zero point, what `int8_product` has too much for that row."""
    return qweight.sum(dim=1, dtype=torch.int32).float().mul_(scale).neg_()[None]


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fxc_kernels.int8_linear.quantize_rows` with fewer temporaries; q is moved up to uint8, the zero point stays float32."""
    lo = rows.amin(dim=-1, keepdim=True).clamp_(max=0)
    scale = rows.amax(dim=-1, keepdim=True).clamp_(min=0).sub_(lo)
    zero = scale <= ZERO_ROW
    inverse = scale.div_(INT8_STEPS).masked_fill_(zero, 1.0).reciprocal()
    zero_point = lo.mul_(inverse).neg_().add_(INT8_MIN).round_()
    q = (rows * inverse).round_().add_(zero_point + UINT8_ZERO).clamp_(0, INT8_STEPS)
    return q.to(torch.uint8), scale, zero_point


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, zero_point_term: Tensor, bias: Tensor | None,
    activation: str = "none", dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """The operator, on a weight that is packed."""
    if dense is not None and x.numel() <= limit * x.shape[-1]:
        return activated(dense_linear(x, dense, bias), activation)

    def product(rows: Tensor) -> tuple[Tensor, Tensor]:
        q, row_scale, row_zero_point = _quantize_rows(rows)
        return int8_product(q, weight, scale, zero_point).addcmul_(row_zero_point, zero_point_term), row_scale

    return in_blocks(product, x, scale.shape[0], bias, activation)


def _stored(row_value: Tensor) -> Tensor:
    """row_value [M, 1], computed once per row: Inductor would repeat its division for every vector that uses it."""
    from torch._inductor import inductor_prims  # seconds to import, and eager does without

    return inductor_prims.force_stride_order(row_value, (1, 1))


def int8_linear_compiled(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, zero_point_term: Tensor, bias: Tensor | None,
    activation: str = "none", dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """The operator, on a weight as it is stored, written for Inductor to fuse.

    The product is written as float32: bfloat16 would round it before the rows' zero points are taken out, where it can
    be many times larger than the result, and was not faster.
    """
    if dense is not None and x.numel() <= limit * x.shape[-1]:
        return activated(dense_linear(x, dense, bias), activation)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    row_scale, inverse, row_zero_point = map(_stored, row_parameters(rows))
    # `round_rows` moved up to uint8: whole numbers of float32 are moved exactly, and clamped as integers it compiles better.
    q = ((rows.float() * inverse).round() + (row_zero_point + UINT8_ZERO)).to(torch.int32)
    q = q.clamp(0, INT8_STEPS).to(torch.uint8)
    product = int8_product(q, torch.ops.fxc_cpu.pack_int8(weight), scale, zero_point)
    return finished(product + row_zero_point * zero_point_term, row_scale, x, bias, activation)
