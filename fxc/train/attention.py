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
    """aten.scaled_dot_product_attention of [B, H, N, D]. It is another only in bfloat16, where scores are rounded to it, and an
    error is about twice that of torch's; of masks in numbers only such that bfloat16 has."""
    given = (query, key, value)
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        given = [each.to(torch.get_autocast_dtype("cpu")) for each in given]
    if dropout_p or not _takes(*given, enable_gqa) or not _is_plain(attn_mask):
        return SDPA(*given, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = given
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    bias = None
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        bias = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf) if is_bool else _numbers(attn_mask)
        bias = bias.to(query.dtype).expand(*query.shape[:2], *bias.shape[-2:])
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query * (query.shape[-1] ** -0.5 if scale is None else scale), key, value, bias)


def _takes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    given = (query, key, value)
    if not all(each.dtype == torch.bfloat16 and each.device.type == "cpu" and each.ndim == 4 for each in given):
        return False
    heads = key.shape[1] * (query.shape[1] // max(key.shape[1], 1)) if enable_gqa else key.shape[1]
    shapes = {tuple(query.shape[:2]), (key.shape[0], heads), (value.shape[0], heads)}
    return len(shapes) == 1 and query.numel() > 0 and key.numel() > 0


def _is_plain(mask: Tensor | None) -> bool:
    """Whether a mask is one by which every query sees something, and that bfloat16 has, so that torch agrees."""
    if mask is None:
        return True
    if mask.dtype == torch.bool:
        return bool(mask.any(-1).all())
    seen = _numbers(mask).float()
    return not mask.requires_grad and bool((seen > -torch.inf).any(-1).all()) and torch.equal(seen.bfloat16().float(), seen)


def _numbers(mask: Tensor) -> Tensor:
    """What is added to scores; the least number of a wider type, which stands for what is hidden, is -inf."""
    return mask.masked_fill(mask <= torch.finfo(torch.bfloat16).min, -torch.inf)


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
