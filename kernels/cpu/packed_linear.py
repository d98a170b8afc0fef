"""Float linear layers on a CPU. A bfloat16 weight is packed by oneDNN once, which halves the time of a single row."""

import torch
from torch import Tensor


def pack_bfloat16(weight: Tensor) -> Tensor:
    """bfloat16 [N, K] -> an opaque oneDNN tensor of that shape, for `dense_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def packed_where_it_helps(weight: Tensor) -> Tensor:
    """weight [N, K] of any floating-point type, packed if it is bfloat16 and oneDNN multiplies that here."""
    packs = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return pack_bfloat16(weight) if packs else weight


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight^T + bias in x's dtype. weight: [N, K] of that dtype, packed or not; bias: [N] of any."""
    bias = None if bias is None else bias.to(x.dtype)
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight, bias)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
