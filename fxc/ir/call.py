"""The arguments of an operator's call by the names that its schema gives them, wherever they stand and whether given or not."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx
from torch._ops import OpOverload


class Call:
    """A call in a graph. `call["dim"]` is the argument of that name, `call[0]` the one at that place; where it was not given,
    it is the default, and without a default None. Raises `KeyError` for an argument that the operator does not have."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node):
        self.node = node

    def __getitem__(self, name: str | int) -> Any:
        places = _places(self.node.target)
        if isinstance(name, int):
            name = next(n for n, (place, _) in places.items() if place == name)
        place, default = places[name]
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        return self.node.args[place] if place is not None and place < len(self.node.args) else default

    def get(self, name: str) -> Any:
        """The argument, None where the operator has none of that name."""
        return self[name] if name in _places(self.node.target) else None

    def __contains__(self, name: str) -> bool:
        return name in _places(self.node.target)

    @property
    def value(self) -> Any:
        """The type of the result."""
        return self.node.meta["val"]

    @property
    def name(self) -> str:
        """The operator, as a person would name it."""
        return str(self.node.target).removesuffix(".default")

    @property
    def rank(self) -> int:
        return self.value.ndim

    def shape_of(self, name: str | int) -> tuple[Any, ...]:
        """The sizes of an argument that is a tensor."""
        return tuple(self[name].meta["val"].shape)

    def set(self, name: str, argument: Any) -> None:
        """Give the argument another value, at its place where it has one."""
        place, _ = _places(self.node.target)[name]
        given = self.node.args
        if place is None or name in self.node.kwargs:
            self.node.kwargs = {**self.node.kwargs, name: argument}
        else:
            between = tuple(self[i] for i in range(len(given), place))
            self.node.args = (*given[:place], *between, argument, *given[place + 1 :])

    def become(self, target: OpOverload, *args: Any, **kwargs: Any) -> None:
        """Call another operator in this one's place. Its type is to be inferred anew."""
        self.node.target, self.node.args, self.node.kwargs = target, args, kwargs


@cache
def _places(target: OpOverload) -> dict[str, tuple[int | None, Any]]:
    """Name -> (place among the positional arguments, or None of one that is given by name only; default)."""
    arguments = target._schema.arguments
    return {a.name: (None if a.kwarg_only else i, a.default_value) for i, a in enumerate(arguments)}
