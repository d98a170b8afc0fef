"""``fxc_ranks::all_reduce``: the sum of what several processes computed, each with its part of one program.

A program that is divided among processes (`fxc.parallel`) has it after each product whose weight was cut along what it sums over.
Only such programs call it: no artifact names an operator of ``fxc_ranks``.
"""

import torch
from torch import Tensor, distributed


def all_reduce(x: Tensor) -> Tensor:
    """x of any shape and floating dtype, alike in every process of the default group -> the sum over them, the same bits in each.
    Raises RuntimeError where there is no group, or another process of it is gone."""
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


torch.library.define("fxc_ranks::all_reduce", "(Tensor x) -> Tensor")
torch.library.impl("fxc_ranks::all_reduce", "default", all_reduce)
torch.library.register_fake("fxc_ranks::all_reduce", lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
ALL_REDUCE = torch.ops.fxc_ranks.all_reduce.default
