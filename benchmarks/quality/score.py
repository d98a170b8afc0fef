"""How well a causal language model predicts windows of tokens. Runs in fxc's environment and in the peers': torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 8


def peak() -> int:
    """The most bytes that this process has held. Its own account: to what waits for it the parent counts as well, as it was
    when this one began."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


@torch.inference_mode()
def losses(model: Any, windows: Tensor) -> list[float]:
    """Of each window [S] of `windows` [N, S], the sum in nats over all tokens but the first."""
    found = []
    for ids in windows.split(ROWS):
        logits = model(input_ids=ids, use_cache=False).logits
        for row, expected in zip(logits, ids):
            found.append(torch.nn.functional.cross_entropy(row[:-1].float(), expected[1:], reduction="sum").item())
    return found
