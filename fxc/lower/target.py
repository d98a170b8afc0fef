"""Choose the lowering for a device."""

from __future__ import annotations

import torch
from torch import nn

from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.lower.cpu import LayerChoice, lower_cpu

BACKENDS = ("eager", "inductor")


def lower(program: Program, device: torch.device, backend: str) -> tuple[nn.Module, list[LayerChoice]]:
    """A module (flat tensors in, flat tuple out) that runs `program` on `device`, and what was chosen for each layer.

    On CUDA every operator runs by its own definition, on whatever kernels torch has for it: fxc's Triton kernels are not
    there yet. Raises `UsageError` for a backend or a device that does not exist.
    """
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    if device.type == "cpu":
        return lower_cpu(program, backend)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this machine has no CUDA device that torch can use", hint="'fxc doctor' says why; use device=cpu"
        )
    module = program.module(device)
    return (torch.compile(module, dynamic=True) if backend == "inductor" else module), []
