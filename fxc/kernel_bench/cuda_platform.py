"""One NVIDIA GPU, through captured graphs."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from fxc.kernel_bench import cuda, limits
from fxc.kernel_bench.clock import FEW_CALLS, GRAPH_CALLS, ROUND_US, GraphClock
from fxc.kernel_bench.contender import Contender
from fxc.kernel_bench.cuda_runner import CudaRunner
from fxc.kernel_bench.limits import Peaks
from fxc_kernels.fp8_linear import FP8_CAPABILITY

# Copies of a weight are together so many times the L2, which then holds none of what the next call reads.
COLD = 4
_SIDE = 8192
_COPY_BYTES = 2**30


class CudaPlatform:
    """See `fxc.kernel_bench.run.Platform`."""

    def __init__(self, device: torch.device):
        from fxc_kernels.cuda.dispatch import chip_of

        torch.cuda.set_device(device)
        self.device = device
        self.properties = torch.cuda.get_device_properties(device)
        self.name = chip_of(device)
        self.runner = CudaRunner(device)
        self.clock = GraphClock(self.runner)

    @property
    def capability(self) -> int:
        return 10 * self.properties.major + self.properties.minor

    def contenders(self, schemes: tuple[str, ...]) -> list[Contender]:
        return cuda.contenders(schemes, self.capability)

    def copies(self, nbytes: float) -> int:
        return max(1 + int(COLD * self.properties.L2_cache_size // max(nbytes, 1)), 2)

    def free_memory(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def datasheet(self) -> Peaks | None:
        return limits.datasheet(self.name)

    def measured_peaks(self, seconds: float) -> Peaks:
        """Bandwidth: of copying 1 GB, which reads and writes. Operations: of 8192^3 products by torch. A GPU takes less than a
        second for all of it, whatever `seconds` are."""
        source = torch.ones(_COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        bandwidth = 2 * _COPY_BYTES / self._seconds(lambda: target.copy_(source))
        x = torch.randn(_SIDE, _SIDE, device=self.device).bfloat16()
        found = {"bf16": lambda: torch.nn.functional.linear(x, x)}
        q = x.mul(30).clamp(-127, 127).to(torch.int8)
        found["int8"] = lambda: torch._int_mm(q, q.t())
        if self.capability >= FP8_CAPABILITY:
            one, f = torch.ones((), device=self.device), x.to(torch.float8_e4m3fn)
            found["fp8"] = lambda: torch._scaled_mm(f, f.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        rates = {}
        for name, call in found.items():
            try:
                rates[name] = 2.0 * _SIDE**3 / self._seconds(call)
            except RuntimeError:  # what this torch cannot multiply on this chip has no peak
                continue
        # The better of the two kinds of eight bits: torch's int8 product may not be what the chip can.
        rates["int8"] = max(rates.get("int8", 0.0), rates.get("fp8", 0.0)) or None
        return Peaks("measured in this run", bandwidth, sparse=True, **rates)

    def _seconds(self, call) -> float:
        replay = self.runner.capture([call] * GRAPH_CALLS)
        self.runner.microseconds(replay, 1)
        return min(self.runner.microseconds(replay, 1) for _ in range(5)) * 1e-6 / GRAPH_CALLS

    def about(self) -> dict[str, Any]:
        return {
            "name": self.properties.name,
            "chip": self.name,
            "capability": self.capability,
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "l2_bytes": self.properties.L2_cache_size,
            "driver": self.runner.driver(),
            "cuda": torch.version.cuda,
            "nvidia_smi": shutil.which("nvidia-smi") is not None,
            "timing": f"graphs of {GRAPH_CALLS} calls or more ({FEW_CALLS} of calls above {ROUND_US / 1e3:g} ms), replayed for "
            f"{ROUND_US / 1e3:g} ms a round or once, timed by events",
            "weights": f"weights take turns with copies until they are {COLD} times the L2: each is read from memory",
        }
