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
from fxc.lower.remembered import cpu_name
from fxc_kernels.cpu import int8_product
from fxc_kernels.cpu.packed_linear import dense_linear, packed_where_it_helps

# What copies of one weight may take in order to be more than the L3 holds.
COPIES_BYTES = 256 * 2**20
MOST_COPIES = 64
# What measuring the peaks may take, in seconds.
PEAK_SECONDS = 8.0
_SMALLEST_READ, _LARGEST_READ = 2**29, 2**31
# Of what the system says its last cache holds, so often at least: what is read must not be there from the time before.
_CACHES = 8
_SIDES = (256, 512, 1024, 2048)
FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


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
        return cpu.contenders(schemes)

    def copies(self, nbytes: float) -> int:
        """More than twice the L3 holds, where COPIES_BYTES are enough for that; else one, for all alike."""
        wanted = 2 * self.l3 if 2 * self.l3 <= COPIES_BYTES else 0
        return min(max(-(-wanted // max(int(nbytes), 1)), 1), MOST_COPIES)

    def free_memory(self) -> int:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024

    def datasheet(self) -> None:
        return None

    def measured_peaks(self, seconds: float) -> Peaks:
        """Bandwidth of memory, and operations of square products, both of sizes that grow while the figure still changes and
        there is time: `seconds` in all. All by as many threads as the products have, and the bandwidth by one thread too. A
        product that already takes too long at the smallest size has none."""
        each = min(seconds, PEAK_SECONDS) / 5
        rates = {name: _operations(make, each) for name, make in _PRODUCTS.items()}
        bandwidth = one = _bandwidth(_CACHES * self.l3, self.free_memory() // 4, each)
        if self.threads > 1:
            torch.set_num_threads(1)
            try:
                one = _bandwidth(_CACHES * self.l3, self.free_memory() // 4, each)
            finally:
                torch.set_num_threads(self.threads)
        words = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return Peaks(f"measured in this run, {words}", bandwidth, one_thread=one, **rates)

    def about(self) -> dict[str, Any]:
        able = torch.cpu.get_capabilities()
        cache = f"{self.l3 / 2**20:.0f} MB" if self.l3 else "unknown size"
        weights = f"copies of a weight take turns, until they are twice what the L3 of {cache} holds"
        if 2 * self.l3 > COPIES_BYTES or not self.l3:
            weights = f"there is one copy of each weight, which may stay in the L3 of {cache}"
        return {
            "name": kind_of_cpu(),
            "chip": self.name,
            "cores": self.cores,
            "threads": self.threads,
            "flags": [flag for flag in FLAGS if able.get(flag)],
            "l2_bytes_per_core": self.l2,
            "l3_bytes": self.l3,
            "timing": f"a round is the median of calls for {1e3 * self.clock.seconds:.0f} ms, after one that does not count",
            "weights": weights,
            "load_before": round(os.getloadavg()[0], 2),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }


def kind_of_cpu() -> str:
    """The CPU's name, and what its vectors are where that is not AVX-512: a virtual machine may give CPUs of many generations
    one name."""
    able = torch.cpu.get_capabilities()
    vectors = next((flag for flag in ("avx512_f", "avx_vnni", "avx2") if able.get(flag)), "no vectors")
    return cpu_name() if vectors == "avx512_f" else f"{cpu_name()} ({vectors})"


def cache_bytes(level: int) -> int:
    """Of the first core's cache of this level, 0 where the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
        if (index / "level").read_text().strip() == str(level) and kind in ("Unified", "Data"):
            return int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
    return 0


def _bandwidth(at_least: int, at_most: int, seconds: float) -> float:
    """Bytes that memory gives a second to whatever reads it fastest. The buffer grows from what no cache should hold until
    reading it gets no slower: what a virtual machine says of its caches need not be true. at_least, at_most: bytes."""
    start, size, found = time.perf_counter(), max(at_least, _SMALLEST_READ), 0.0
    while True:
        numbers = torch.ones(max(min(size, at_most), 2**20) // 4)
        rate = 4 * numbers.numel() / min(_best(each, 5) for each in (numbers.sum, lambda x=numbers: torch.dot(x, x)))
        is_last = 2 * size > min(_LARGEST_READ, at_most) or time.perf_counter() - start > seconds / 2
        if is_last or (found and rate > 0.95 * found):
            return rate
        found, size = rate, 2 * size


def _float32(side: int) -> Callable[[], object]:
    x = torch.randn(side, side)
    return lambda: torch.nn.functional.linear(x, x)


def _bf16(side: int) -> Callable[[], object]:
    x = torch.randn(side, side).bfloat16()
    weight = packed_where_it_helps(x)
    return lambda: dense_linear(x, weight, None)


def _int8(side: int) -> Callable[[], object]:
    qweight = torch.randint(-127, 128, (side, side), dtype=torch.int8)
    product, scale, zeros = int8_product.pack_int8(qweight), torch.ones(side), torch.zeros(side, dtype=torch.int64)
    x = int8_product.to_uint8(qweight)
    return lambda: int8_product.int8_product(x, product, scale, zeros)


_PRODUCTS = {"float32": _float32, "bf16": _bf16, "int8": _int8}


def _operations(make: Callable[[int], Callable[[], object]], seconds: float) -> float | None:
    """Operations a second of the largest square product whose calls fit into `seconds`; None where none does."""
    rate = None
    for side in _SIDES:
        if rate is not None and 7 * 2.0 * side**3 / rate > seconds:
            return rate
        call = make(side)
        start = time.perf_counter()
        call()
        if 6 * (time.perf_counter() - start) > seconds:
            return rate
        rate = 2.0 * side**3 / _best(call)
    return rate


def _best(call: Callable[[], object], calls: int = 5) -> float:
    call()
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)
