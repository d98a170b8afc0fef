"""Rivals of fxc's kernels, each where it is installed: `fxc bench kernels --peers benchmarks.kernel_peers`."""

import torch

from fxc.kernel_bench.contender import Contender
from fxc.kernel_bench.run import Platform


def contenders(schemes: tuple[str, ...], platform: Platform) -> list[Contender]:
    """See `fxc.kernel_bench.peers`."""
    # What the other device needs may not be installed.
    if platform.device.type == "cpu":
        from benchmarks.kernel_peers import cpu

        return cpu.contenders(schemes, torch.get_num_threads())
    from benchmarks.kernel_peers import cuda

    return cuda.contenders(schemes, platform.capability)
