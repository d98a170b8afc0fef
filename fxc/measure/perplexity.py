"""How well a causal language model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxc.data.text import windows
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.next_token import losses_of
from fxc.progress import Track, untracked

# Batches are cut so that their logits have about this many numbers.
_LOGITS = 1 << 26
_MOST_ROWS = 8
# exp of it is still a float64.
WORST_LOSS = 700


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean loss; tokens: how many were scored; losses, counts: for each window, the sum of its losses
    in nats and how many tokens that sum is over."""

    value: float
    tokens: int
    window: int
    losses: list[float]
    counts: list[int]


def perplexity(
    model: Callable[..., Any], tokens: Tensor, window: int = 256, *, limit: int | None = None, track: Track = untracked
) -> Perplexity:
    """The perplexity of a causal language model over windows that do not overlap; every token but a window's first is
    scored. model: called with input_ids [B, S] int64, returns an object with .logits [B, S, V]; tokens: [T] int64.

    Raises `UsageError` when there are too few tokens, one that the model does not have, or windows longer than it
    takes, and `VerificationFailed` when the model gives something that is not a number.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or 32_000
    longest = getattr(config, "max_position_embeddings", None) or window
    if window < 2 or window > longest:
        raise UsageError(f"a window of {window} tokens", why=f"the model takes 2 to {longest}", hint="--window N")
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens, too few to predict one")
    if int(tokens.max()) >= vocabulary:
        raise UsageError(
            f"the text has the token {int(tokens.max())}, and the model knows {vocabulary}",
            hint="the tokenizer belongs to another model",
        )
    rows = min(_MOST_ROWS, max(1, _LOGITS // (window * vocabulary)))
    losses, counts = [], []
    batches = windows(tokens, window, rows, limit)
    for ids in track(batches, "perplexity", len(batches)):
        with torch.inference_mode():
            logits = model(input_ids=ids.to(getattr(model, "device", "cpu")), use_cache=False).logits
        for row, expected in zip(logits, ids):
            loss = losses_of(row[None].cpu(), expected[None], "sum").item()
            if not math.isfinite(loss):
                raise VerificationFailed(
                    f"the loss of window {len(losses)} is {loss}", hint="the model's logits hold NaN or infinities"
                )
            losses.append(loss)
            counts.append(len(expected) - 1)
    mean = sum(losses) / sum(counts)
    if mean > WORST_LOSS:
        raise VerificationFailed(f"the mean loss is {mean:.0f} nats", hint="no perplexity can be computed: the model is broken")
    return Perplexity(math.exp(mean), sum(counts), window, losses, counts)


def relative_change(before: Perplexity, after: Perplexity) -> tuple[float, float | None]:
    """The relative change of perplexity and its standard error, from the paired differences of the windows; of a single
    window there is no such error."""
    total = sum(before.counts)
    differences = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    mean = sum(differences) / total
    spread = sum((d - n * mean) ** 2 for d, n in zip(differences, before.counts))
    count = len(differences)
    error = math.sqrt(spread * count / (count - 1)) / total if count > 1 else None
    return math.expm1(mean), error
