"""How well a causal language model's logits predict its own input."""

from __future__ import annotations

import torch
from torch import Tensor


def losses_of(logits: Tensor, ids: Tensor, reduction: str = "none") -> Tensor:
    """What each token but the first costs in nats, by the logits of the one before: float32 [B * (N - 1)], or by `reduction`
    their "sum" or "mean", []. logits [B, N, V]; ids [B, N] int64, where -100 counts for nothing."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum in nats of the losses of all tokens of a row but its first, [] float64.

    logits [B, N, V]; ids [B, N] int64; mask [B, P + N], not zero where a token is: one counts where both it
    and the one before it are.
    """
    losses = losses_of(logits, ids)
    if mask is not None:
        losses = losses * counted(ids, mask).flatten()
    return losses.double().sum()


def counted(ids: Tensor, mask: Tensor) -> Tensor:
    """Which tokens `next_token_loss` is over, bool [B, N - 1]."""
    there = mask[:, -ids.shape[1] :] != 0
    return there[:, 1:] & there[:, :-1]
