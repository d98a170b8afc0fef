"""Attention in training on a CPU: torch's own goes through keys in blocks too small for its products, and backwards too.

Here all scores of some heads are computed at once, as many as stay in the cache, and again on the way back: between the two
nothing is kept but what attention is given, as in FlashAttention (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

SDPA = torch.ops.aten.scaled_dot_product_attention.default
# Scores that are computed at once: 1 MB of bfloat16.
PART = 1 << 19


def faster(module: fx.GraphModule) -> fx.GraphModule:
    """The same module, whose attention is `attention`."""
    for node in module.graph.find_nodes(op="call_function", target=SDPA):
        node.target = attention
    module.recompile()
    return module


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten.scaled_dot_product_attention of [B, H, N, D]. Only in bfloat16 this is another one: scores are rounded to it, and an
    error is about twice that of torch's."""
    given = (query, key, value)
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        given = [each.to(torch.get_autocast_dtype("cpu")) for each in given]
    is_ours = all(each.dtype == torch.bfloat16 and each.device.type == "cpu" and each.ndim == 4 for each in given)
    if not is_ours or dropout_p or (attn_mask is not None and attn_mask.requires_grad) or _hides_all(attn_mask):
        return SDPA(*given, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = given
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    bias = None if attn_mask is None else attn_mask.to(query.dtype)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:2], *bias.shape[-2:])
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query * (query.shape[-1] ** -0.5 if scale is None else scale), key, value, bias)


def _hides_all(mask: Tensor | None) -> bool:
    """Whether a query sees nothing: what it gives is agreed on nowhere."""
    return mask is not None and not bool((mask if mask.dtype == torch.bool else mask > -1e4).any(-1).all())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        made = value.new_empty(*query.shape[:-1], value.shape[-1])
        for part in _parts(query, key):
            torch.matmul(_shares(query, key, bias, part), value[part], out=made[part])
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, given: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, bias = ctx.saved_tensors
        grads = [torch.empty_like(each) for each in (query, key, value)]
        for part in _parts(query, key):
            shares = _shares(query, key, bias, part)
            torch.matmul(shares.mT, given[part], out=grads[2][part])
            scores = torch._softmax_backward_data(given[part] @ value[part].mT, shares, -1, shares.dtype)
            torch.matmul(scores, key[part], out=grads[0][part])
            torch.matmul(scores.mT, query[part], out=grads[1][part])
        return *grads, None


def _shares(query: Tensor, key: Tensor, bias: Tensor | None, part: tuple) -> Tensor:
    scores = query[part] @ key[part].mT
    return (scores if bias is None else scores.add_(bias[part])).softmax(-1)


def _parts(query: Tensor, key: Tensor) -> list[tuple[int, slice]]:
    """Of samples some heads at a time."""
    heads = max(PART // (query.shape[-2] * key.shape[-2]), 1)
    return [(at, slice(begin, begin + heads)) for at in range(len(query)) for begin in range(0, query.shape[1], heads)]
