"""Random weights in every format, and what a product with them should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxc.kernel_bench.shapes import Shape
from fxc_kernels import fp8_linear, int4_linear, sparse24_linear

SCHEMES = (
    "int8", "int8_weight_only", "int4_g32", "int4_g64", "int4_g128", "fp8", "fp8_weight_only", "sparse24", "int8_sparse24",
)  # fmt: skip
ALIASES = {"int4": "int4_g128"}
# The two of four places in which a 2:4 weight may have numbers, as half a byte of positions.
_PLACES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
# Rows of a reference product: of more, evenly spread ones are compared.
CHECKED_ROWS = 512
_CHUNK = 1 << 24


def format_of(scheme: str) -> str:
    """What the weights of a scheme are stored as: schemes that differ in the activations share them."""
    return {"float32": "dense", "bf16": "dense"}.get(scheme, scheme.removesuffix("_weight_only"))


def group_of(scheme: str) -> int:
    """Of int4_g128: 128."""
    return int(scheme.removesuffix("_zero").rpartition("_g")[2])


def unfit(scheme: str, shape: Shape) -> str | None:
    """Why a weight of this shape cannot be stored so; None when it can."""
    need, what = 1, ""
    if scheme.startswith("int4"):
        need, what = group_of(scheme), "a group"
    elif "sparse24" in scheme:
        need, what = sparse24_linear.BYTE, "two groups of four, whose positions share a byte"
    return f"{scheme}: K = {shape.k} is not a multiple of {need}, {what}" if shape.k % need else None


@dataclass
class Weights:
    """One weight [n, k]. parts, by format:

    dense: float32 with bfloat16 values; int8, fp8: qweight [N, K], scale [N]; int4_gG: qweight uint8 [N, K/2], scale bfloat16
    [N, K/G]; int4_gG_zero: those and zero uint8 [N, K/G]; sparse24: values bfloat16 [N, K/2], meta [N, K/8]; int8_sparse24:
    values int8, meta, scale [N].
    """

    format: str
    n: int
    k: int
    parts: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def copy(self) -> Weights:
        return Weights(self.format, self.n, self.k, tuple(part.clone() for part in self.parts))

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """Rows start to end of the weight as float32 numbers."""
        parts = [part[start:end] for part in self.parts]
        if self.format == "dense":
            return parts[0]
        if self.format == "fp8":
            return fp8_linear.dequantize(*parts)
        if self.format == "int8":
            return parts[0].float() * parts[1][:, None]
        if self.format == "sparse24":
            return sparse24_linear.unpack(*parts).float()
        if self.format == "int8_sparse24":
            return sparse24_linear.unpack(parts[0], parts[1]).float() * parts[2][:, None]
        zero = parts[2] if len(parts) == 3 else None
        return int4_linear.dequantize(parts[0], parts[1], zero, group_of(self.format))

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] -> (which rows, their float32 products): at most CHECKED_ROWS of them, the first and the last among them."""
        rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], CHECKED_ROWS), device=x.device).round().long()
        some = x[rows].float()
        step = max(_CHUNK // self.k, 1)
        products = [some @ self.dense(at, at + step).t() for at in range(0, self.n, step)]
        return rows, torch.cat(products, dim=1)


def make(kind: str, shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Weights:
    """Random weights of a format. Numbers are normal where they can be, as real ones are: power and clocks depend on them."""
    n, k = shape.n, shape.k
    generator = torch.Generator(device).manual_seed(seed)

    def normal(columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(n, columns, generator=generator, device=device).mul_(scale)

    def scales(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device).mul_(1e-2).add_(1e-3)

    def whole(columns: int) -> Tensor:
        return normal(columns, 32.0).round_().clamp_(-127, 127).to(torch.int8)

    def places() -> Tensor:
        table = torch.tensor(_PLACES, dtype=torch.uint8, device=device)
        first, second = (table[torch.randint(6, (n, k // 8), generator=generator, device=device)] for _ in range(2))
        return first | second << 4

    builders: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "dense": lambda: (normal(k, 0.02).bfloat16().float(),),
        "int8": lambda: (whole(k), scales(n)),
        "fp8": lambda: (fp8_linear.round_to_fp8(normal(k, 100.0)), scales(n)),
        "sparse24": lambda: (normal(k // 2, 0.02).bfloat16(), places()),
        "int8_sparse24": lambda: (whole(k // 2), places(), scales(n)),
    }
    if kind in builders:
        return Weights(kind, n, k, builders[kind]())
    groups = (n, k // group_of(kind))
    # Groups of normal numbers have ranges that differ by some 10 %, and 7 steps of 0.4 times their deviation to each side.
    low, high = (normal(k // 2, 2.5).round_().add_(8).clamp_(0, 15).to(torch.uint8) for _ in range(2))
    spread = torch.rand(groups, generator=generator, device=device).mul_(0.2).add_(0.9)
    parts = (low | high << 4, (scales(n, 1) * spread).bfloat16())
    if kind.endswith("_zero"):
        parts += (torch.randint(6, 11, groups, generator=generator, device=device, dtype=torch.uint8),)
    return Weights(kind, n, k, parts)


def quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [M, K], scale [M, 1]) of float rows, in torch's own operators."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(127)
    return (x / scale).round_().to(torch.int8), scale
