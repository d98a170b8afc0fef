"""CUDA graphs, events and nvidia-smi: all that needs a GPU, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence

import torch

from fxc.kernel_bench.clock import Telemetry
from fxc.kernel_bench.contender import Call

_QUERY = "clocks.sm,power.draw,temperature.gpu"


class CudaRunner:
    """See `fxc.kernel_bench.clock.Runner`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.smi = shutil.which("nvidia-smi")
        self.uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in dict.fromkeys(calls):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def microseconds(self, replay: Callable[[], object], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def telemetry(self, replay: Callable[[], None], repeats: int) -> Telemetry | None:
        if self.smi is None:
            return None
        for _ in range(repeats):
            replay()
        found = self._ask(_QUERY)
        torch.cuda.synchronize(self.device)
        return parse_telemetry(found)

    def driver(self) -> str | None:
        """Its version, None where nothing says it."""
        return (self.smi and self._ask("driver_version")) or None

    def _ask(self, what: str) -> str:
        command = [self.smi, f"--id={self.uuid}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return "" if done.returncode else done.stdout.strip()


def parse_telemetry(line: str) -> Telemetry | None:
    """ "1980, 312.40, 45" -> its numbers; None where one of them is missing, as "[N/A]" is."""
    try:
        clock, power, temperature = (float(part) for part in line.split(","))
    except ValueError:
        return None
    return Telemetry(clock, power, temperature)
