"""Several processes of one run (`torchrun`), over torch.distributed.

Where they train one program each takes its share of a batch, and gradients are added up.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fxc.errors import ResourceError


def is_first() -> bool:
    """Whether this process prints and writes: the first of those that torchrun started, or the only one."""
    return not _launched() or int(os.environ["RANK"]) == 0


def join(device: torch.device | str = "cpu") -> None:
    """Meet the others that torchrun started, where it did: by gloo, and by NCCL for what is on a GPU."""
    if _launched() and not distributed.is_initialized():
        is_cpu = torch.device(device).type == "cpu"
        distributed.init_process_group("gloo" if is_cpu else "cpu:gloo,cuda:nccl")
        # A thread of the group that lets go of the last collective's tensor asks for the interpreter, and aborts the process
        # where that is gone by then (pytorch/pytorch#179291).
        atexit.register(_leave)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end)


def has_joined() -> bool:
    """Whether there is a group of processes, be it of one."""
    return distributed.is_available() and distributed.is_initialized()


def count() -> int:
    return distributed.get_world_size() if _joined() else 1


def number() -> int:
    """Of this process, from 0 on."""
    return distributed.get_rank() if _joined() else 0


def own_device(device: torch.device | str) -> torch.device:
    """Of CUDA devices, where none is named, the one of this process's number on its machine."""
    found = torch.device(device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if found == torch.device("cuda") else found


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Those of `items` that are this process's."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if _joined() else items


def added(value: float) -> float:
    """The sum over all processes, the same in each."""
    if not _joined():
        return value
    return float(added_tensor(torch.tensor(value, dtype=torch.float64)))


def added_tensor(tensor: Tensor) -> Tensor:
    """The sum over all processes, which have one of the same shape and dtype each."""
    return _reduced(tensor, distributed.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """Number by number the largest of all processes."""
    return _reduced(tensor, distributed.ReduceOp.MAX)


def _reduced(tensor: Tensor, by: distributed.ReduceOp) -> Tensor:
    if not _joined():
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    with others_there():
        distributed.all_reduce(total, by)
    return total


def agreed(value: Any, of: int = 0) -> Any:
    """What the first process has, or another one."""
    if not _joined():
        return value
    values = [value]
    with others_there():
        distributed.broadcast_object_list(values, src=of)
    return values[0]


def agreed_tensor(tensor: Tensor) -> Tensor:
    """What the first process has; all have the shape and the dtype."""
    if not _joined():
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    with others_there():
        distributed.broadcast(tensor, 0)
    return tensor


def send(said: Any, tensors: Sequence[Tensor], to: int) -> None:
    """To the process `to`: anything that can be pickled, and tensors after it."""
    with others_there():
        distributed.send_object_list([said], dst=to)
        for each in tensors:
            distributed.send(_bytes(each.contiguous()), dst=to)


def receive(of: int, types: Callable[[Any], Sequence[tuple[torch.dtype, torch.Size]]]) -> tuple[Any, list[Tensor]]:
    """What the process `of` sends. types: dtype and shape of each tensor, as what it said first tells."""
    with others_there():
        said = [None]
        distributed.recv_object_list(said, src=of)
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in types(said[0])]
        for each in tensors:
            distributed.recv(_bytes(each), src=of)
        return said[0], tensors


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


@contextmanager
def others_there(kind: type[Exception] = RuntimeError) -> Iterator[None]:
    """Around what fails by an error of this kind where another process is gone. Raises `ResourceError` then."""
    try:
        yield
    except kind as error:
        raise ResourceError(
            "another process of this run is gone", why=str(error).partition("\n")[0],
            hint="what it printed says why; a compilation goes on by the same command with --resume",
        ) from error  # fmt: skip


def _end(number: int, frame: FrameType | None) -> None:
    raise ResourceError(
        "the run was ended from outside, as torchrun does where one of its processes is gone",
        hint="the first failure that torchrun prints says which; a compilation goes on by the same command with --resume",
    )


def gathered(part: Tensor) -> Tensor:
    """The parts [N] of all processes, one after another."""
    if not _joined():
        return part
    whole = part.new_empty(count(), part.numel())
    with others_there():
        distributed.all_gather(list(whole), part.contiguous())
    return whole.flatten()


def added_part(tensor: Tensor) -> Tensor:
    """Of the sum over all processes of [N * processes] this process's part [N]."""
    # Not reduce_scatter: gloo has none in every version of torch.
    return added_tensor(tensor).view(count(), -1)[number()]


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each process's gradients become the sum of all. A parameter that has none in any of them keeps none."""
    if not _joined():
        return
    parameters = list(parameters)
    # One message, with what has a gradient at its end.
    has = torch.tensor([float(each.grad is not None) for each in parameters])
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    message = torch.cat([*(each.flatten().float() for each in grads), has])
    with others_there():
        distributed.all_reduce(message)
    *sums, has = message.split([each.numel() for each in parameters] + [len(parameters)])
    for parameter, total, number in zip(parameters, sums, has.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype).clone() if number else None


def _launched() -> bool:
    return distributed.is_available() and distributed.is_torchelastic_launched()


def _leave() -> None:
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.2)  # others may run: the threads do not end with their group


def _joined() -> bool:
    return has_joined() and distributed.get_world_size() > 1
