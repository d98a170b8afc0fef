"""Which structures of a layer can be zeroed, what is zero then, and what has to become smaller. Every module of
`token_layers` and `image_layers` says which it has (`structures`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


class RmsNorm(nn.Module):
    def __init__(self, width: int, cast: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.cast = cast

    def forward(self, x):
        wide = x.to(torch.float32) if self.cast else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def norm_of(kind: str | None, width: int) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "plain":
            return nn.LayerNorm(width, elementwise_affine=False)
        case "rms" | "rms_cast":
            return RmsNorm(width, cast=kind == "rms_cast")
    return nn.Identity()


@dataclass(frozen=True)
class Structure:
    """Indices that can be zeroed, 0 to size - 1, and what is zero for each: (parameter, index into it). shrinks: the
    parameters that have to become smaller for each index, the dimension, and by how much; empty where zeroing is no proof
    that anything may go; stays: how many units stay where all are zeroed, since no axis becomes empty."""

    size: int
    zeros: Callable[[int], list[tuple[str, tuple]]]
    shrinks: list[tuple[str, int, int]] = field(default_factory=list)
    stays: int = 1


def structures(model: nn.Module) -> dict[str, Structure]:
    """What can be zeroed in `model`, by "module:structure"."""
    return {f"{name}:{kind}": s for name, module in model.named_modules() for kind, s in _structures(name, module)}


def _structures(name: str, module: nn.Module) -> Iterator[tuple[str, Structure]]:
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias"
    weight = f"{prefix}weight"
    match module:
        case nn.Linear() | nn.Conv2d():
            shape = module.weight.shape
            yield "rows", Structure(shape[0], lambda i: [(weight, (i,))])
            if module.bias is not None:
                yield "rows_and_bias", Structure(shape[0], lambda i: [(weight, (i,)), (bias, (i,))])
            yield "columns", Structure(shape[1], lambda i: [(weight, (slice(None), i))])
        case nn.BatchNorm2d() | nn.GroupNorm() | nn.LayerNorm() | RmsNorm() if module.weight is not None:
            yield "scales", Structure(len(module.weight), lambda i: [(weight, (i,))])
            if getattr(module, "bias", None) is not None:
                yield "scales_and_bias", Structure(len(module.weight), lambda i: [(weight, (i,)), (bias, (i,))])
    for kind, structure in getattr(module, "structures", lambda: {})().items():
        yield (
            kind,
            Structure(
                structure.size,
                lambda i, zeros=structure.zeros: [(prefix + fqn, index) for fqn, index in zeros(i)],
                [(prefix + fqn, dim, by) for fqn, dim, by in structure.shrinks],
                structure.stays,
            ),
        )


def elements(model: nn.Module) -> dict[str, int]:
    """The weights of which one element is neither a row nor a column -> how many elements."""
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {f"{n}.weight": w.numel() for n, w in layers.items() if len(w) > 1 and w[0].numel() > 1}


def units(parts: list[tuple[str, int]], width: int = 1, first: int = 0) -> Callable[[int], list[tuple[str, tuple]]]:
    """Index i -> a run of `width` positions from first + i * width on, of each (parameter, dimension)."""
    return lambda i: [
        (fqn, (*[slice(None)] * dim, slice(first + i * width, first + (i + 1) * width))) for fqn, dim in parts
    ]  # fmt: skip


def parts_of(model: nn.Module, layer: str, dim: int = 0) -> list[tuple[str, int]]:
    """The weight of `layer`, and for rows its bias, if it has one."""
    found = getattr(model, layer)
    return [(f"{layer}.weight", dim)] + ([(f"{layer}.bias", 0)] if dim == 0 and found.bias is not None else [])


def shrink_of(parts: list[tuple[str, int]], by: int = 1) -> list[tuple[str, int, int]]:
    return [(fqn, dim, by) for fqn, dim in parts]
