"""The chip that is checked: the shapes and configurations that it is given, and random tensors on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxc_kernels.cuda.tile import Config, capability_of

# (rows, outputs, columns)
SMALL = ((1, 1, 8), (3, 17, 40), (20, 33, 264), (70, 34, 72))
ODD = ((1, 1, 8), (2, 17, 40), (3, 9, 536), (7, 65, 136), (33, 20, 264), (65, 34, 72), (130, 1000, 1000))
UNEVEN = ((1, 1, 1), (2, 17, 33), (7, 65, 129), (70, 33, 65))
REAL = ((1, 4608, 3584), (4, 3584, 18944), (16, 37888, 3584), (64, 3584, 3584), (200, 2048, 29568), (2048, 4608, 3584))
CONFIGURED = (4608, 3584)
SPLIT = Config(None, 16, 32, 32, 4, 3, split=3)
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class Chip:
    device: torch.device
    capability: int
    interpreted: bool

    def shipped(self, configs: dict[int, tuple[Config, ...]]) -> tuple[Config, ...]:
        """What is shipped for this chip; in the interpreter, which is slow, one that is cut into parts."""
        if self.interpreted:
            return (SPLIT,)
        return configs[max(generation for generation in configs if generation <= self.capability)]

    def products(self, multiple: int = 8) -> Iterator[tuple[tuple[int, int, int], torch.dtype, Config | None]]:
        """(rows, outputs, columns), dtype of the activations, no configuration: what dispatch would launch."""
        shapes = SMALL if self.interpreted else (*(UNEVEN if multiple == 1 else ()), *ODD, *REAL)
        for at, (rows, outputs, columns) in enumerate(shapes):
            columns = -(-columns // multiple) * multiple
            for dtype in (torch.bfloat16, torch.float16) if at % 5 == 2 else (torch.bfloat16,):
                yield (rows, outputs, columns), dtype, None

    def configured(self, configs: dict[int, tuple[Config, ...]], multiple: int = 8):
        """Each shipped configuration, at the largest number of rows that it is for."""
        for config in self.shipped(configs):
            shape = (9, 33, 264) if self.interpreted else (config.rows or 2048, *CONFIGURED)
            yield (*shape[:2], -(-shape[2] // multiple) * multiple), torch.bfloat16, config

    def tensors(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.Generator]:
        """x [M, K], which leans to one side so that its zero points are not near 0, a bias [N], a generator."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        x = (torch.randn(shape[0], shape[2], generator=generator, device=self.device) + 0.4).to(dtype)
        return x, torch.randn(shape[1], generator=generator, device=self.device).to(dtype), generator

    def scales(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.rand(*shape, generator=generator, device=self.device) * 0.02 + 0.001

    def weight(self, kind: torch.dtype, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(qweight [N, K], scale [N])."""
        _, outputs, columns = shape
        if kind == torch.int8:
            made = torch.randint(-127, 128, (outputs, columns), generator=generator, device=self.device, dtype=torch.int8)
        else:
            made = (50 * torch.randn(outputs, columns, generator=generator, device=self.device)).to(kind)
        return made, self.scales(outputs, generator=generator)

    def sparse(self, shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A 2:4 weight: (positions uint8 [N, K/8], values [N, K/2])."""
        _, outputs, columns = shape
        chosen = torch.randint(0, 6, (outputs, columns // 4), generator=generator, device=self.device)
        pairs = torch.tensor(PAIRS, device=self.device)[chosen].reshape(outputs, -1, 4)
        meta = (pairs * torch.tensor([1, 4, 16, 64], device=self.device)).sum(-1).to(torch.uint8)
        if dtype == torch.int8:
            return meta, self.weight(dtype, (1, outputs, columns // 2), generator)[0]
        return meta, torch.randn(outputs, columns // 2, generator=generator, device=self.device).to(dtype)


def chip_here() -> Chip:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    return Chip(device, capability_of(torch.empty(0, device=device)), interpreted)
