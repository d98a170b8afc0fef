"""The tables that the integers of an input look something up in, which bound them."""

from __future__ import annotations

from torch import Tensor, fx

from fxc.schemes.scheme import EMBEDDING, product_of

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
            if current is _indices(user):
                sizes.append(_rows(user))
            elif user.op == "call_function" and getattr(user.target, "__name__", "").partition(".")[0] in _KEEPING:
                waiting.append(user)
    return min(sizes, default=None)


def bound_of(node: fx.Node) -> int:
    """Below what to draw integers for `node`: the size of the smallest table that they index, also after shifts by a constant;
    2 where none is found."""
    return min((_rows(user) for user in _readers(node) if _indices(user) is not None), default=2)


def _indices(node: fx.Node) -> fx.Node | None:
    """What a lookup, in a table of floats or a packed one, is given to look up; None for any other node."""
    if node.target is EMBEDDING:
        return node.args[1]
    product = product_of(node.target)
    return node.args[0] if product and product.layer is EMBEDDING else None


def _rows(lookup: fx.Node) -> int:
    """How many rows the table of a lookup has."""
    return lookup.args[0 if lookup.target is EMBEDDING else 1].meta["val"].shape[0]


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a value, looked for through casts, reshapes and shifts by a constant."""
    found = []
    for user in node.users:
        found.append(user)
        passes_on = user.op == "call_function" and _indices(user) is None and user.args[:1] == (node,)
        value = user.meta.get("val")
        if passes_on and isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype:
            found += _readers(user)
    return found
