"""Several processes that train one program (`torchrun`): each takes its share of a batch, and gradients are added up.

Every process holds all weights, gradients and moments. Weights that one machine cannot hold so often would have to be in
shards, gathered layer by layer before they are used (FSDP): that is not here.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import distributed, nn


def is_first() -> bool:
    """Whether this process prints and writes: the first of those that torchrun started, or the only one."""
    return not _launched() or int(os.environ["RANK"]) == 0


def join() -> None:
    """Meet the others that torchrun started, where it did. By gloo: programs are trained on the CPU."""
    if _launched() and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        # A thread of the group that lets go of the last collective's tensor asks for the interpreter, and aborts the process
        # where that is gone by then (pytorch/pytorch#179291).
        atexit.register(_leave)


def count() -> int:
    return distributed.get_world_size() if _joined() else 1


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Those of `items` that are this process's."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if _joined() else items


def added(value: float) -> float:
    """The sum over all processes, the same in each."""
    if not _joined():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return float(total)


def agreed(value: Any) -> Any:
    """What the first process has."""
    if not _joined():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each process's gradients become the sum of all. A parameter that has none in any of them keeps none."""
    if not _joined():
        return
    parameters = list(parameters)
    # One message, with what has a gradient at its end.
    has = torch.tensor([float(each.grad is not None) for each in parameters])
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    message = torch.cat([*(each.flatten().float() for each in grads), has])
    distributed.all_reduce(message)
    *sums, has = message.split([each.numel() for each in parameters] + [len(parameters)])
    for parameter, total, number in zip(parameters, sums, has.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype).clone() if number else None


def _launched() -> bool:
    return distributed.is_available() and distributed.is_torchelastic_launched()


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.2)  # others may run: the threads do not end with their group


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
