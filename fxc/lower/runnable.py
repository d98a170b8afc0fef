"""From a lowered program to what runs it."""

from __future__ import annotations

import torch
from torch import nn

from fxc.ir.program import Program
from fxc.lower.aoti import Package
from fxc.lower.inductor import CompiledGraph, dynamic_dims
from fxc_kernels.cpu import native
from fxc_kernels.cpu.ops import FUNCTIONS

Running = native.Running
"""Around each call of what `runnable` gives, so that models in several threads share the cores."""


def runnable(program: Program, device: torch.device | str, backend: str) -> nn.Module:
    """A module (flat input tensors positionally to a flat tuple of tensors) that runs the lowered `program` on `device`, with
    Inductor for `backend` "inductor", compiled ahead of time by it for "aoti". It shares the program's constants where they are
    on the device already.

    Raises `UsageError` without a C++ compiler for inductor, and for aoti where the cache folder does not have the code either.
    """
    device = torch.device(device)
    if backend == "aoti":
        return Package(program)
    module = program.module(device)
    is_compiled = backend == "inductor"
    # On CUDA there are none, and the code that the module was made with stands.
    if found := [node for node in module.graph.nodes if node.target in FUNCTIONS]:
        for node in found:
            node.target = FUNCTIONS[node.target][is_compiled]
        module.recompile()
    if not is_compiled:
        # Found without `nn.Module.__getattr__`, which takes as long as a small operator.
        module.__dict__.update(module._buffers)
        return module
    return CompiledGraph(module, dynamic_dims(module.graph), freezing=device.type == "cpu")
