"""The operators ``fxc_ranks::*``: what several processes tell each other that run one program, each with its part of it.

A program that is divided among processes (`fxc.parallel`) has an all_reduce after each product whose weight was cut along what
it sums over, and a with_range before one that rounds each row by the row's own range. No artifact names these operators.
"""

from collections.abc import Callable

import torch
from torch import Tensor, distributed


def all_reduce(x: Tensor) -> Tensor:
    """x of any shape and floating dtype, alike in every process of the group -> the sum over them, the same bits in each.
    Raises ConnectionError where another process of it is gone."""
    return _reduced(x.clone(memory_format=torch.contiguous_format), distributed.ReduceOp.SUM)


def _reduced(x: Tensor, by: distributed.ReduceOp) -> Tensor:
    try:
        if x.numel():
            distributed.all_reduce(x, by)
    except (RuntimeError, ValueError) as error:  # ValueError: there is no group
        raise ConnectionError(str(error)) from error
    return x


RANGE = 16
"""How many columns `with_range` adds: kernels like rows of a multiple of that."""


def ends(x: Tensor) -> Tensor:
    """x [..., K] -> [..., 2]: minus the smallest and the largest of each row, of which the maximum over processes is taken."""
    return torch.stack([-x.amin(-1), x.amax(-1)], -1)


def extended(x: Tensor, ends: Tensor) -> Tensor:
    """x [..., K] -> [..., K + RANGE], the smallest and the largest of the row that `ends` tells beside it."""
    low, high = (each.expand(*x.shape[:-1], RANGE // 2) for each in (-ends[..., :1], ends[..., 1:]))
    return torch.cat([x, low, high], -1)


def with_range(x: Tensor) -> Tensor:
    """x [..., K], a part of each row -> [..., K + RANGE]: whoever rounds by the range of these rounds by that of the whole row.
    The columns that are added stand over zeros of the weight. Raises ConnectionError as `all_reduce` does."""
    return extended(x, _reduced(ends(x), distributed.ReduceOp.MAX))


def _define(name: str, function: Callable[[Tensor], Tensor], more: int) -> torch._ops.OpOverload:
    # Not torch.library.custom_op, which costs 20 us a call.
    torch.library.define(f"fxc_ranks::{name}", "(Tensor x) -> Tensor")
    torch.library.impl(f"fxc_ranks::{name}", "default", function)
    torch.library.register_fake(f"fxc_ranks::{name}", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] + more))
    return getattr(torch.ops.fxc_ranks, name).default


ALL_REDUCE = _define("all_reduce", all_reduce, 0)
WITH_RANGE = _define("with_range", with_range, RANGE)
