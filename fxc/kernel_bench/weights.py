"""Random weights in every format, and what a product with them should be."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxc.kernel_bench.shapes import Shape
from fxc.schemes import scheme as formats
from fxc.schemes.scheme import LINEAR, Product, Scheme

ALIASES = {f"int{bits}": f"int{bits}_g128" for bits in (4, 3, 2)}
# What follows the name of a scheme whose weights have zero points.
_ZERO = "_zero"
# Random rows that are packed: of more, each is one of these.
PACKED_ROWS = 1024
# Rows of a reference product: of more, evenly spread ones are compared.
CHECKED_ROWS = 512
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Known:
    """What a scheme of the bench is: a product of a format, with these options."""

    format: Scheme
    product: Product
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.product.name.format(**self.options)


def all_schemes() -> dict[str, Known]:
    """Name, as int8, int8_weight_only or int4_g128 -> the products of linear layers of all formats."""
    found: dict[str, Known] = {}
    for format in formats.SCHEMES.values():
        for product in (product for product in format.products if product.layer is LINEAR):
            for choice in itertools.product(*format.options.values()):
                known = Known(format, product, dict(zip(format.options, choice)))
                found.setdefault(known.name, known)
    return found


def known(kind: str) -> Known:
    """The scheme, or the format, that is called so. Raises KeyError where there is none."""
    plain = all_schemes()[kind.removesuffix(_ZERO)]
    return replace(plain, options=plain.options | {"symmetric": False}) if kind.endswith(_ZERO) else plain


def format_of(scheme: str) -> str:
    """What the weights of a scheme are stored as: schemes that differ in the activations share them."""
    if scheme in ("float32", "bf16"):
        return "dense"
    found = known(scheme)
    return replace(found, product=found.format.products[0]).name + (_ZERO if scheme.endswith(_ZERO) else "")


def group_of(scheme: str) -> int:
    """Of int4_g128: 128."""
    return known(scheme).options["group"]


def unfit(scheme: str, shape: Shape) -> str | None:
    """Why a weight of this shape cannot be stored so; None when it can."""
    found = known(scheme)
    need, what = found.format.multiple(**found.options)
    return f"{scheme}: K = {shape.k} is not a multiple of {need}, {what}" if shape.k % need else None


@dataclass
class Weights:
    """One weight [n, k]. parts: of a bfloat16 weight, in the order of its format's record; of dense ones, which have
    bfloat16 values, it alone in float32."""

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
        scheme = known(self.format).format
        return scheme.dense(dict(zip(scheme.parts, parts))).float()

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] -> (which rows, their float32 products): at most CHECKED_ROWS of them, the first and the last among them."""
        rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], CHECKED_ROWS), device=x.device).round().long()
        some = x[rows].float()
        step = max(_CHUNK // self.k, 1)
        products = [some @ self.dense(at, at + step).t() for at in range(0, self.n, step)]
        return rows, torch.cat(products, dim=1)


def make(kind: str, shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Weights:
    """Random weights of a format. Numbers are normal, as real ones are about: power and clocks depend on them."""
    n, k = shape.n, shape.k
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=generator, device=device).mul_(0.02).bfloat16()

    if kind == "dense":
        return Weights(kind, n, k, (normal(n).float(),))
    found = known(kind)
    parts = found.format.pack(normal(min(n, PACKED_ROWS)), **found.options)
    if n > PACKED_ROWS:
        rows = torch.randint(PACKED_ROWS, (n,), generator=generator, device=device)
        parts = {part: _taken(tensor, rows) for part, tensor in parts.items()}
    return Weights(kind, n, k, tuple(parts.values()))


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows], of float8 too, which cannot be indexed."""
    return tensor[..., None].view(torch.uint8)[rows].view(tensor.dtype).squeeze(-1)


def quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [M, K], scale [M, 1]) of float rows, in torch's own operators."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(127)
    return (x / scale).round_().to(torch.int8), scale
