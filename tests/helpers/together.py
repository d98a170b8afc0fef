"""Programs of several processes, run in threads of one: what they add up meets at a barrier."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, fx

from fxc.ir.program import Program
from fxc_kernels.collectives import ALL_REDUCE, WITH_RANGE, ends, extended


class _One(fx.Interpreter):
    def __init__(self, program: Program, number: int, slots: list, barrier: threading.Barrier) -> None:
        super().__init__(program.module())
        self.number, self.slots, self.barrier = number, slots, barrier

    def call_function(self, target, args, kwargs):
        if target is ALL_REDUCE:
            return self.meet(args[0]).sum(0)
        if target is WITH_RANGE:
            return extended(args[0], self.meet(ends(args[0])).amax(0))
        return super().call_function(target, args, kwargs)

    def meet(self, tensor: Tensor) -> Tensor:
        """What all of them have, one after another."""
        self.slots[self.number] = tensor
        self.barrier.wait()
        every = torch.stack(self.slots)
        self.barrier.wait()
        return every


@torch.no_grad()
def together(programs: list[Program], inputs: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    """What each program gives for its inputs."""
    slots, barrier = [None] * len(programs), threading.Barrier(len(programs), timeout=60)
    runs = [_One(program, number, slots, barrier) for number, program in enumerate(programs)]

    def run(number: int) -> tuple[Tensor, ...]:
        try:
            with torch.no_grad():
                return runs[number].run(*inputs[number])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(run, range(len(runs))))
