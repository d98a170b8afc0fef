"""What bounds a product: the bytes it must move and the operations it must do, over what the machine can move and do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxc.kernel_bench.weights import known


@dataclass(frozen=True)
class Peaks:
    """Bytes and dense operations a second, by the threads that the products have; None where it is not known or the machine
    cannot. one_thread: the bytes that one thread reads a second."""

    source: str
    bandwidth: float
    float32: float | None = None
    bf16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    sparse: bool = False
    one_thread: float | None = None

    def operations(self, scheme: str) -> float | None:
        """A second, for the products that this scheme's activations and weights ask for. sparse: the machine does 2:4 products
        at twice the speed of dense ones."""
        dense = self._dense(scheme)
        is_sparse = scheme not in ("float32", "bf16") and known(scheme).format.is_sparse
        return 2 * dense if dense and self.sparse and is_sparse else dense

    def _dense(self, scheme: str) -> float | None:
        if scheme == "float32":
            return self.float32
        activations = None if scheme == "bf16" else known(scheme).product.activations
        if activations == torch.int8:
            return self.int8
        return self.fp8 if activations == torch.float8_e4m3fn and self.fp8 else self.bf16


# NVIDIA's datasheets, where what is given with sparsity is halved; the name as `fxc_kernels.cuda.dispatch.chip_of` has it.
DATASHEET = {
    "h200": Peaks("NVIDIA H200 datasheet", 4.8e12, 67e12, 989.5e12, 1979e12, 1979e12, True),
    "h100-nvl": Peaks("NVIDIA H100 NVL datasheet", 3.9e12, 60e12, 835.5e12, 1670.5e12, 1670.5e12, True),
    "h100-pcie": Peaks("NVIDIA H100 PCIe datasheet", 2.0e12, 51e12, 756e12, 1513e12, 1513e12, True),
    "h100": Peaks("NVIDIA H100 SXM datasheet", 3.35e12, 67e12, 989.5e12, 1979e12, 1979e12, True),
    "a100-sxm4-40gb": Peaks("NVIDIA A100 40GB datasheet", 1.555e12, 19.5e12, 312e12, 624e12, None, True),
    "a100-pcie-40gb": Peaks("NVIDIA A100 40GB datasheet", 1.555e12, 19.5e12, 312e12, 624e12, None, True),
    "a100-80gb-pcie": Peaks("NVIDIA A100 80GB PCIe datasheet", 1.935e12, 19.5e12, 312e12, 624e12, None, True),
    "a100": Peaks("NVIDIA A100 80GB SXM datasheet", 2.039e12, 19.5e12, 312e12, 624e12, None, True),
    "l40s": Peaks("NVIDIA L40S datasheet", 0.864e12, 91.6e12, 362e12, 733e12, 733e12, True),
}


def datasheet(chip: str) -> Peaks | None:
    """Of the first name above that `chip` ("nvidia-h200") contains."""
    return next((peaks for name, peaks in DATASHEET.items() if name in chip), None)


def weight_bytes(scheme: str, n: int, k: int) -> float:
    """Of one weight [n, k] as it is stored, its scales, zero points and positions with it."""
    count = n * k
    if scheme == "float32":
        return 4.0 * count
    if scheme == "bf16":
        return 2.0 * count
    found = known(scheme)
    parts = found.format.planned(torch.empty(n, k, dtype=torch.bfloat16, device="meta"), **found.options)
    return float(sum(part.nbytes for part in parts.values()))


def moved_bytes(scheme: str, n: int, k: int, m: int, x_size: int = 2, y_size: int = 2) -> float:
    """The weight, x [m, k] and y [m, n] once each, of x_size and y_size bytes a number."""
    return weight_bytes(scheme, n, k) + x_size * m * k + y_size * m * n


def operations(n: int, k: int, m: int) -> float:
    """Multiplications and additions of the dense product, whatever the scheme: a 2:4 product leaves half of them out."""
    return 2.0 * n * k * m


def limit_us(peaks: Peaks, scheme: str, n: int, k: int, m: int, x_size: int = 2, y_size: int = 2) -> float | None:
    """Microseconds that no product of this scheme can be below; None where the machine's speed is not known."""
    rate = peaks.operations(scheme)
    if rate is None:
        return None
    return 1e6 * max(moved_bytes(scheme, n, k, m, x_size, y_size) / peaks.bandwidth, operations(n, k, m) / rate)
