"""What is known of a value without running the program, and what the rules of operators say it with.

It is kept compactly: a dimension along which a value does not vary, as every dynamic one, has size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.mapped import pieces

# So much of a weight is looked at at once: in float64 it takes four times as much.
AT_ONCE = 1 << 25


@dataclass(frozen=True, eq=False)
class Known:
    """values, mask: of one shape, in which each size is that of the value's dimension or 1; mask: where `values` hold."""

    values: Tensor
    mask: Tensor

    @property
    def is_complete(self) -> bool:
        # An expanded mask is read once along what it is expanded along.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.mask.stride())
        return bool(self.mask[once].all())

    def zeros(self) -> Tensor:
        """Where the value is known to be zero."""
        return self.mask & (self.values == 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        """The same rearrangement of both."""
        return Known(function(self.values), function(self.mask))


class OfConstant(Known):
    """Of a constant all is known. It is asked for wherever it is read, for a program that is larger than memory lets go of what
    was asked for before."""

    def __init__(self, program: Program, name: str) -> None:
        object.__setattr__(self, "_constants", program.constants)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "mask", torch.ones((), dtype=torch.bool).expand(program.constants[name].shape))

    @property
    def values(self) -> Tensor:
        return self._constants[self._name]


@dataclass
class State:
    """What is known so far. past: an input that holds what a call returned -> the result that it is."""

    program: Program
    past: dict[fx.Node, fx.Node] = field(default_factory=dict)
    found: dict[fx.Node, Any] = field(default_factory=dict)

    def get(self, argument: Any) -> Known | None:
        return self.found.get(argument) if isinstance(argument, fx.Node) else None

    def has_all_of(self, *parameters: Any) -> bool:
        """Whether all of each parameter that is a tensor is known."""
        return all(
            not isinstance(p, fx.Node) or ((known := self.get(p)) is not None and known.is_complete) for p in parameters
        )


def compute(state: State, call: Call, first: Tensor) -> Tensor:
    """What the operator makes of `first` and of its other arguments, which are known."""
    others = fx.map_arg(call.node.args[1:], lambda n: state.found[n].values)
    return call.node.target(first, *others, **call.node.kwargs)


def widened(known: Known, dim: int, size: int) -> Known:
    """With dimension `dim` written out to `size`."""
    if known.values.shape[dim] == size:
        return known
    sizes = [-1] * known.values.ndim
    sizes[dim] = size
    return known.map(lambda t: t.expand(sizes))


def uniform(known: Known, dims: list[int]) -> Known:
    """With size 1 along `dims`, known where all along them are and agree."""
    values, mask = known.values, known.mask
    for d in dims:
        first, there, at = values.narrow(d, 0, 1), mask.narrow(d, 0, 1), 0
        for piece in pieces(values.movedim(d, 0), AT_ONCE):
            its, at = mask.narrow(d, at, len(piece)), at + len(piece)
            there = there & (its & (piece.movedim(0, d) == first)).all(d, keepdim=True)
            if not there.any():
                break
        values, mask = first, there
    return Known(values, mask)


def finite(values: Tensor, mask: Tensor, rank: int) -> Known:
    """Known where the values are numbers, with `rank` dimensions."""
    if values.dtype.is_floating_point:
        mask = mask & values.isfinite()
    values, mask = torch.broadcast_tensors(values, mask)
    while values.ndim < rank:
        values, mask = values[None], mask[None]
    return Known(values, mask)


def constant_along(known: Known | None, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """(mask, values float64) [size]: where along `dim` the value is the same number at all positions."""
    if known is None:
        return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)
    values = known.values.movedim(dim, -1).reshape(-1, known.values.shape[dim])
    mask = known.mask.movedim(dim, -1).reshape(-1, known.values.shape[dim])
    mask = (mask & (values == values[:1])).all(0)
    return mask.expand(size), torch.where(mask, values[0], 0).double().expand(size)


def is_read(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """bool, of the shape that `weight` has without `dims`: where some number along them is not zero."""
    found = [piece.any(dims) for piece in pieces(weight, AT_ONCE)]
    return torch.stack(found).any(0) if 0 in dims else torch.cat(found)


def unread(weight: fx.Node, known: Mapping[fx.Node, Known], size: int, dims: tuple[int, ...]) -> Tensor:
    """[size] bool: where a weight is zero along all of `dims`; nowhere, unless all of it is known."""
    its = known.get(weight)
    if its is None or not its.is_complete:
        return torch.zeros(size, dtype=torch.bool)
    return ~is_read(its.values.expand(weight.meta["val"].shape), dims)


def vanishes(argument: fx.Node, dim: int, known: Mapping[fx.Node, Known]) -> Tensor | None:
    """[batch dimensions, size]: where along dimension `dim` (-1 or -2) the operand is zero all along the other of the two."""
    if (k := known.get(argument)) is None:
        return None
    zero = k.zeros().all(-2 if dim == -1 else -1)
    size = argument.meta["val"].shape[dim]
    return zero if zero.shape[-1] == size else zero.expand(*zero.shape[:-1], size)


def either(size: int, a: Tensor | None, b: Tensor | None) -> Tensor:
    """[size] bool: where `a` or `b` is true in all of the batch."""
    if a is None and b is None:
        return torch.zeros(size, dtype=torch.bool)
    found = b if a is None else a if b is None else a | b
    return found.reshape(-1, size).all(0)
