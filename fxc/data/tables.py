"""The tables that the integers of an input look something up in, which bound them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_EMBEDDING = torch.ops.aten.embedding.default
# Operators that keep the values of integers.
_KEEPING = frozenset({"view", "reshape", "unsqueeze", "expand", "clone", "contiguous", "slice", "select", "to", "_to_copy"})


def table_size(node: fx.Node) -> int | None:
    """The size of the smallest table that the integers of `node` index, as they are; None where none is found."""
    if node.meta["val"].dtype.is_floating_point:
        return None
    sizes, waiting = [], [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user.target is _EMBEDDING and user.args[1] is current:
                sizes.append(user.args[0].meta["val"].shape[0])
            elif user.op == "call_function" and getattr(user.target, "__name__", "").partition(".")[0] in _KEEPING:
                waiting.append(user)
    return min(sizes, default=None)


def bound_of(node: fx.Node) -> int:
    """Below what to draw integers for `node`: the size of the smallest table that they index, also after shifts by a constant;
    2 where none is found."""
    sizes = [user.args[0].meta["val"].shape[0] for user in _readers(node) if user.target is _EMBEDDING]
    return min(sizes, default=2)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a value, looked for through casts, reshapes and shifts by a constant."""
    found = []
    for user in node.users:
        found.append(user)
        passes_on = user.op == "call_function" and user.target is not _EMBEDDING and user.args[:1] == (node,)
        value = user.meta.get("val")
        if passes_on and isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype:
            found += _readers(user)
    return found
