"""A hash of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(tensors: Iterable[Tensor], text: str = "") -> str:
    """SHA-256 of `text`, and of the tensors' dtypes, shapes and numbers, in order; on the CPU."""
    made = hashlib.sha256(text.encode())
    for tensor in tensors:
        made.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        made.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return made.hexdigest()
