"""Programs lowered and made to run, for tests that ask what comes out."""

from torch import nn

from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable


def on_cpu(program, backend="eager", **options) -> tuple[nn.Module, list]:
    """(what runs `program` on the CPU, a LayerChoice for each layer)."""
    lowered, layers = lower_cpu(program, backend, **options)
    return runnable(lowered, "cpu", backend), layers


def for_cuda(program, backend="eager", **options) -> tuple[nn.Module, list]:
    """(`program` lowered for CUDA and run on the CPU, where operators compute their definitions; as above)."""
    from fxc.lower.cuda import lower_cuda

    lowered, layers = lower_cuda(program, "cpu", backend, **options)
    return runnable(lowered, "cpu", backend), layers
