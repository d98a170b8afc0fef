"""This machine's CPU: its caches, its memory, and how fast they and its units are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxc.kernel_bench import cpu
from fxc.kernel_bench.clock import CpuClock
from fxc.kernel_bench.contender import Contender
from fxc.kernel_bench.limits import Peaks
from fxc.lower import packed

# What copies of one weight may take in order to be more than the L3 holds.
COPIES_BYTES = 256 * 2**20
MOST_COPIES = 64
_READ_BYTES = (16 * 2**20, 64 * 2**20)
_SIDE = 2048
_FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


class CpuPlatform:
    """See `fxc.kernel_bench.run.Platform`."""

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.clock = CpuClock()
        self.cores = torch.cpu.get_capabilities().get("num_physical_cores") or os.cpu_count() or 1
        self.l2, self.l3 = cache_bytes(2), cache_bytes(3)

    def contenders(self, schemes: tuple[str, ...]) -> list[Contender]:
        return cpu.contenders(schemes, self.threads)

    def copies(self, nbytes: float) -> int:
        """More than twice the L3 holds, where COPIES_BYTES are enough for that; else one, for all alike."""
        wanted = 2 * self.l3 if 2 * self.l3 <= COPIES_BYTES else 0
        return min(max(-(-wanted // max(int(nbytes), 1)), 1), MOST_COPIES)

    def free_memory(self) -> int:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024

    def datasheet(self) -> None:
        return None

    def measured_peaks(self) -> Peaks:
        """Bandwidth: the best of reading and copying 16 and 64 MB, which a large L3 holds; operations: of 2048^3 products."""
        bandwidth = max(_bandwidth(size) for size in _READ_BYTES)
        x = torch.randn(_SIDE, _SIDE)
        dense = packed.DenseLinear(x.bfloat16(), None)
        qweight, scale = x.mul(30).clamp(-127, 127).to(torch.int8), torch.ones(_SIDE)
        product, zeros = packed.pack_int8(qweight), torch.zeros(_SIDE, dtype=torch.int64)
        x_bf16 = x.bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "float32": lambda: torch.nn.functional.linear(x, x),
            "bf16": lambda: dense(x_bf16),
            "int8": lambda: packed.int8_product(packed.to_uint8(qweight), product, scale, zeros),
        }
        count = 2.0 * _SIDE**3
        return Peaks("measured in this run", bandwidth, **{name: count / _best(call) for name, call in calls.items()})

    def about(self) -> dict[str, Any]:
        able = torch.cpu.get_capabilities()
        cache = f"{self.l3 / 2**20:.0f} MB" if self.l3 else "unknown size"
        weights = f"copies of a weight take turns, until they are twice what the L3 of {cache} holds"
        if 2 * self.l3 > COPIES_BYTES or not self.l3:
            weights = f"there is one copy of each weight, which may stay in the L3 of {cache}"
        return {
            "name": cpu_name(),
            "chip": self.name,
            "cores": self.cores,
            "threads": self.threads,
            "flags": [flag for flag in _FLAGS if able.get(flag)],
            "l2_bytes_per_core": self.l2,
            "l3_bytes": self.l3,
            "timing": f"a round is the median of calls for {1e3 * self.clock.seconds:.0f} ms, after one that does not count",
            "weights": weights,
            "load_before": round(os.getloadavg()[0], 2),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }


def cache_bytes(level: int) -> int:
    """Of the first core's cache of this level, 0 where the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
        if (index / "level").read_text().strip() == str(level) and kind in ("Unified", "Data"):
            return int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
    return 0


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else "unknown CPU"


def _bandwidth(size: int) -> float:
    """Bytes a second, what is written counted too."""
    numbers = torch.ones(size // 4)
    other = torch.empty_like(numbers)
    return max(size / _best(numbers.sum, 15), 2 * size / _best(lambda: other.copy_(numbers), 15))


def _best(call: Callable[[], object], calls: int = 5) -> float:
    call()
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)
