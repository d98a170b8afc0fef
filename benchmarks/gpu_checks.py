"""Every Triton kernel against its reference on the GPU at hand: python -m benchmarks.gpu_checks.

For each kernel, odd shapes and real ones, and each configuration that is shipped for the chip: values within a tolerance,
every output written (memory is poisoned beforehand) and nothing behind it, twice the same bits (products of eight warps over
a long K: twelve times), the same bits from a CUDA graph that is replayed, and a changed weight seen. Prints PASS or FAIL for
each case, writes gpu-checks-<device>.json after each kernel, and exits with 1 where one failed.

Each kernel runs in a process of its own: a fault on a GPU ends everything else in its process. With TRITON_INTERPRET=1 small
shapes run in Triton's interpreter, which is how the script itself is tested; inline PTX does not run there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear
from fxc_kernels.cuda import int4_linear as int4
from fxc_kernels.cuda import interleaved, rope, sparse24_prepacked, weight_only
from fxc_kernels.cuda import norm_quantize as norm
from fxc_kernels.cuda import persistent_mm as persistent
from fxc_kernels.cuda import quantize_rows as quantize
from fxc_kernels.cuda import rms_norm as float_norm
from fxc_kernels.cuda import scaled_mm as scaled
from fxc_kernels.cuda import sparse24 as sparse
from fxc_kernels.cuda import sparse24_mma as sparse_mma
from fxc_kernels.cuda import sparse24_prepacked_linear as prepacked
from fxc_kernels.cuda.tile import Config, capability_of

RESULTS = Path(__file__).resolve().parent / "results"
FP8 = torch.float8_e4m3fn
# (largest difference of the largest number, root mean square difference of the root mean square): a whole step of the type, of
# which half is rounding and the rest sums in another order; on average a rounding is a third of half a step. The interpreter
# cuts bfloat16 off where a chip rounds.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.float16: (2**-10, 4e-4), torch.bfloat16: (2**-7, 3e-3)}
INTERPRETED_TOLERANCE = {**TOLERANCE, torch.bfloat16: (2**-7, 6e-3)}
# (rows, outputs, columns)
SMALL = ((1, 1, 8), (3, 17, 40), (20, 33, 264), (70, 34, 72))
ODD = ((1, 1, 8), (2, 17, 40), (3, 9, 536), (7, 65, 136), (33, 20, 264), (65, 34, 72), (130, 1000, 1000))
UNEVEN = ((1, 1, 1), (2, 17, 33), (7, 65, 129), (70, 33, 65))
REAL = ((1, 4608, 3584), (4, 3584, 18944), (16, 37888, 3584), (64, 3584, 3584), (200, 2048, 29568), (2048, 4608, 3584))
GATED = ((1, 18944, 3584), (33, 1001, 264), (2048, 4736, 3584))
PERSISTENT = ((130, 33, 144), (2049, 3584, 18944))
NORMED, NORMED_ROWS = (1, 33, 1000, 3584, 8192, 29568), 2049
# A long K, where warps that read what others have not written yet would show; each so many times.
LONG = ((1000, 4096, 29568), (2048, 4096, 29568))
LONG_RUNS = 12
CONFIGURED = (4608, 3584)
SPLIT = Config(None, 16, 32, 32, 4, 3, split=3)
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
GUARD = 256


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


@dataclass(frozen=True)
class Case:
    """run, expected: without arguments, tensors. wrong: `run` on something changed, which has to be seen. compare: instead of
    the tolerance, (found, expected) -> what is wrong, or "". steps: how many times the tolerance, where a result is rounded
    more often. runs: how often it runs, each time with the same bits."""

    label: str
    run: Callable[[], Any]
    expected: Callable[[], Any]
    wrong: Callable[[], Any] | None = None
    compare: Callable[[Any, Any], str] | None = None
    steps: int = 1
    runs: int = 2


# ----------------------------------------------------------------------------------------------------------- the kernels


def quantize_rows_cases(chip: Chip) -> Iterator[Case]:
    for columns in (1, 3, 128, 1000) if chip.interpreted else (1, 3, 1000, 3584, 18944, 29568, 70001):
        x = chip.tensors((5, 1, columns), torch.bfloat16)[0] * 3
        x[1] = 0
        changed = x * 1.25
        yield Case(
            f"int8 {list(x.shape)}", lambda x=x: quantize.quantize_rows(x), lambda x=x: int8_linear.quantize_rows(x),
            lambda x=changed: quantize.quantize_rows(x), quantized,
        )  # fmt: skip
        if not chip.interpreted and chip.capability >= scaled.FP8_CAPABILITY:
            yield Case(
                f"fp8 {list(x.shape)}", lambda x=x: quantize.quantize_rows(x, FP8),
                lambda x=x: (*fp8_linear.quantize_rows(x), None), lambda x=changed: quantize.quantize_rows(x, FP8), quantized,
            )  # fmt: skip


def norm_quantize_cases(chip: Chip) -> Iterator[Case]:
    for columns in (33, 300) if chip.interpreted else (33, 1000, 3584, 8192, 29568):
        x, weight, generator = chip.tensors((3, columns, columns), torch.float16)
        residual = torch.randn(3, columns, generator=generator, device=chip.device).half()
        for given in (None, residual):

            def expected(x=x, weight=weight, given=given):
                return int8_linear.quantize_rows(norm.rms_norm_reference(x, weight, 1e-5, given)[0])

            yield Case(
                f"rms_norm {'with' if given is not None else 'without'} residual {list(x.shape)}",
                lambda x=x, weight=weight, given=given: norm.rms_norm_quantize(x, weight, 1e-5, given)[:3], expected,
                lambda x=x, weight=weight, given=given: norm.rms_norm_quantize(x, weight * 1.25, 1e-5, given)[:3], quantized,
            )  # fmt: skip
        merged = torch.randn(3, 2 * columns, generator=generator, device=chip.device).half()
        yield Case(
            f"silu_mul {list(merged.shape)}", lambda m=merged: norm.silu_mul_quantize(m),
            lambda m=merged: int8_linear.quantize_rows(norm.silu_mul_reference(m)),
            lambda m=merged: norm.silu_mul_quantize(m * 1.25), quantized,
        )  # fmt: skip


def rms_norm_cases(chip: Chip) -> Iterator[Case]:
    for columns in (1, 33, 300) if chip.interpreted else NORMED:
        for rows in (3,) if chip.interpreted else (1, NORMED_ROWS):
            dtype = torch.float16 if columns == 33 else torch.bfloat16
            x, weight, generator = chip.tensors((rows, columns, columns), dtype)
            residual = torch.randn(rows, columns, generator=generator, device=chip.device).to(dtype)
            for given in (None, residual):
                yield Case(
                    f"{'with' if given is not None else 'without'} residual {list(x.shape)}",
                    lambda a=(x, weight, 1e-6, given): float_norm.rms_norm(*a),
                    lambda a=(x, weight, 1e-6, given): norm.rms_norm_reference(*a),
                    lambda a=(x, weight * 1.25, 1e-6, given): float_norm.rms_norm(*a), normed,
                )  # fmt: skip


def rope_cases(chip: Chip) -> Iterator[Case]:
    """Heads as a projection leaves them [B, S, H, D], seen as [B, H, S, D]; one table for all of a batch or one for each."""
    small = ((1, 3, 5, 8, 1), (2, 9, 3, 20, 2))
    real = ((1, 28, 1, 128, 1), (16, 4, 1, 128, 16), (1, 28, 2048, 128, 1), (3, 17, 70, 80, 3), (2, 32, 257, 64, 1))
    for batch, heads, tokens, width, tables in small if chip.interpreted else (*small, *real):
        generator = torch.Generator(chip.device).manual_seed(batch + heads + tokens + width)
        x = torch.randn(batch, tokens, heads, width, generator=generator, device=chip.device).bfloat16().transpose(1, 2)
        angles = 7 * torch.rand(tables, 1, tokens, width, generator=generator, device=chip.device)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        yield Case(
            f"{list(x.shape)}, {tables} tables", lambda a=(x, cos, sin): rope.rope(*a),
            lambda a=(x, cos, sin): rope.rope_reference(*a), lambda a=(x, cos, -sin): rope.rope(*a), steps=2,
        )  # fmt: skip


def int8_cases(chip: Chip) -> Iterator[Case]:
    for shape, dtype, config in (*chip.products(1), *chip.configured(scaled.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        weight, scale = chip.weight(torch.int8, shape, generator)
        other = altered(weight)
        yield Case(
            label(shape, dtype, config), lambda a=(x, weight, scale, bias), c=config: scaled.int8_linear(*a, config=c),
            lambda a=(x, weight, scale, bias): int8_linear.int8_linear_reference(*a),
            lambda a=(x, other, scale, bias), c=config: scaled.int8_linear(*a, config=c),
        )  # fmt: skip
    yield from gated(chip, torch.int8, scaled.int8_linear, int8_linear.int8_linear_reference)


def fp8_cases(chip: Chip) -> Iterator[Case]:
    if chip.capability < scaled.FP8_CAPABILITY and not chip.interpreted:
        return
    for shape, dtype, config in (*chip.products(1), *chip.configured(scaled.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        weight, scale = chip.weight(FP8, shape, generator)
        q, row_scale = fp8_linear.quantize_rows(x)
        given = (q, row_scale[:, 0].contiguous(), None)
        other = altered(weight)
        yield Case(
            label(shape, dtype, config),
            lambda a=(*given, weight, scale, bias), d=dtype, c=config: scaled.scaled_mm(*a, dtype=d, config=c),
            lambda a=(*given, weight, scale, bias), d=dtype: scaled.scaled_mm_reference(*a).to(d),
            lambda a=(*given, other, scale, bias), d=dtype, c=config: scaled.scaled_mm(*a, dtype=d, config=c),
        )  # fmt: skip


def persistent_cases(chip: Chip, kind: torch.dtype) -> Iterator[Case]:
    if chip.interpreted or chip.capability < persistent.CAPABILITY:
        return
    small = [((1, 16, 16), persistent.CONFIGS[0]), ((257, 1000, 1008), persistent.CONFIGS[0])]
    large = [(shape, config) for config in persistent.CONFIGS for shape in PERSISTENT]
    for shape, config in small + large:
        x, bias, generator = chip.tensors(shape, torch.bfloat16)
        weight, scale = chip.weight(kind, shape, generator)
        given = quantized_rows(kind, x)
        other = altered(weight)
        yield Case(
            label(shape, torch.bfloat16, config),
            lambda a=(*given, weight, scale, bias), c=config: scaled.scaled_mm(*a, config=c),
            lambda a=(*given, weight, scale, bias): scaled.scaled_mm_reference(*a).bfloat16(),
            lambda a=(*given, other, scale, bias), c=config: scaled.scaled_mm(*a, config=c),
        )


def long_cases(chip: Chip, kind: torch.dtype) -> Iterator[Case]:
    """Products of eight warps over a long K, many times."""
    if chip.interpreted or (kind == FP8 and chip.capability < scaled.FP8_CAPABILITY):
        return
    eight = [c for c in chip.shipped(scaled.CONFIGS) if c.warps == 8] + [Config(None, 128, 256, 128, 8, 3)]
    for shape in LONG:
        x, bias, generator = chip.tensors(shape, torch.bfloat16)
        weight, scale = chip.weight(kind, shape, generator)
        given = quantized_rows(kind, x)
        other = altered(weight)
        for config in eight:
            yield Case(
                label(shape, torch.bfloat16, config),
                lambda a=(*given, weight, scale, bias), c=config: scaled.scaled_mm(*a, config=c),
                lambda a=(*given, weight, scale, bias): scaled.scaled_mm_reference(*a).bfloat16(),
                lambda a=(*given, other, scale, bias), c=config: scaled.scaled_mm(*a, config=c), runs=LONG_RUNS,
            )  # fmt: skip


def weight_only_cases(chip: Chip, kind: torch.dtype) -> Iterator[Case]:
    references = {
        torch.int8: int8_linear.int8_weight_only_linear_reference,
        FP8: fp8_linear.fp8_weight_only_linear_reference,
    }
    for shape, dtype, config in (*chip.products(1), *chip.configured(weight_only.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        weight, scale = chip.weight(kind, shape, generator)
        other = altered(weight)
        yield Case(
            label(shape, dtype, config),
            lambda a=(x, weight, scale, bias), c=config: weight_only.weight_only_linear(*a, config=c),
            lambda a=(x, weight, scale, bias): references[kind](*a),
            lambda a=(x, other, scale, bias), c=config: weight_only.weight_only_linear(*a, config=c),
        )
    yield from gated(chip, kind, weight_only.weight_only_linear, references[kind])


def int4_cases(chip: Chip, group: int) -> Iterator[Case]:
    if chip.interpreted:
        config = Config(None, 16, 32, group, 4, 3, split=2)
        configured = [((9, 33, 4 * group), torch.bfloat16, config), ((9, 33, 4 * group), torch.float16, config)]
    else:
        configured = chip.configured(int4.CONFIGS[group], group)
    for at, (shape, dtype, config) in enumerate((*chip.products(group), *configured)):
        x, bias, generator = chip.tensors(shape, dtype)
        _, outputs, columns = shape
        weight = torch.randint(0, 256, (outputs, columns // 2), generator=generator, device=chip.device, dtype=torch.uint8)
        scale = chip.scales(outputs, columns // group, generator=generator)
        zero = torch.randint(0, 16, scale.shape, generator=generator, device=chip.device, dtype=torch.uint8)
        given = zero if at % 2 else None
        packed = int4.prepack(weight, group)
        yield Case(
            f"{label(shape, dtype, config)}{' with zeros' if at % 2 else ''}",
            lambda a=(x, packed, scale, given, bias, group), c=config: int4.int4_weight_only_linear(*a, config=c),
            lambda a=(x, weight, scale, given, bias, group): int4_linear.int4_weight_only_linear_reference(*a),
            lambda a=(x, packed ^ 0x11, scale, given, bias, group), c=config: int4.int4_weight_only_linear(*a, config=c),
        )


def sparse24_cases(chip: Chip) -> Iterator[Case]:
    for shape, dtype, config in (*chip.products(), *chip.configured(sparse.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        meta, values = chip.sparse(shape, dtype, generator)
        yield Case(
            label(shape, dtype, config),
            lambda a=(x, values, meta, bias), c=config: sparse.sparse24_linear(*a, config=c),
            lambda a=(x, values, meta, bias): sparse24_linear.sparse24_linear_reference(*a),
            lambda a=(x, values * 1.5, meta, bias), c=config: sparse.sparse24_linear(*a, config=c),
        )


def int8_sparse24_cases(chip: Chip) -> Iterator[Case]:
    for shape, dtype, config in (*chip.products(), *chip.configured(sparse.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        meta, values = chip.sparse(shape, torch.int8, generator)
        scale, other = chip.scales(shape[1], generator=generator), altered(values)
        yield Case(
            label(shape, dtype, config),
            lambda a=(x, values, meta, scale, bias), c=config: sparse.int8_sparse24_linear(*a, config=c),
            lambda a=(x, values, meta, scale, bias): sparse24_linear.int8_sparse24_linear_reference(*a),
            lambda a=(x, other, meta, scale, bias), c=config: sparse.int8_sparse24_linear(*a, config=c),
        )


def sparse24_mma_cases(chip: Chip) -> Iterator[Case]:
    if chip.interpreted:
        return
    for shape, dtype, config in (*chip.products(), *chip.configured(sparse_mma.CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        meta, values = chip.sparse(shape, dtype, generator)
        weight, other = (sparse24_prepacked.prepack(each, meta) for each in (values, values * 1.5))
        yield Case(
            label(shape, dtype, config),
            lambda a=(x, weight, bias), c=config: prepacked.prepacked_linear(*a, config=c),
            lambda a=(x, values, meta, bias): sparse24_linear.sparse24_linear_reference(*a),
            lambda a=(x, other, bias), c=config: prepacked.prepacked_linear(*a, config=c),
        )


def int8_sparse24_mma_cases(chip: Chip) -> Iterator[Case]:
    if chip.interpreted:
        return
    for shape, dtype, config in (*chip.products(), *chip.configured(sparse_mma.INT8_CONFIGS)):
        x, bias, generator = chip.tensors(shape, dtype)
        meta, values = chip.sparse(shape, torch.int8, generator)
        scale = chip.scales(shape[1], generator=generator)
        weight, other = (sparse24_prepacked.prepack(each, meta) for each in (values, altered(values)))
        yield Case(
            label(shape, dtype, config),
            lambda a=(x, weight, scale, bias), c=config: prepacked.int8_prepacked_linear(*a, config=c),
            lambda a=(x, values, meta, scale, bias): sparse24_linear.int8_sparse24_linear_reference(*a),
            lambda a=(x, other, scale, bias), c=config: prepacked.int8_prepacked_linear(*a, config=c),
        )


def gated(chip: Chip, kind: torch.dtype, linear: Callable, reference: Callable) -> Iterator[Case]:
    """silu(gate) * up in the epilogue, on rows of gate and up in turns."""
    for shape in ((3, 9, 40), (70, 17, 72)) if chip.interpreted else GATED:
        x, _, generator = chip.tensors(shape, torch.bfloat16)
        gate, up = (chip.weight(kind, shape, generator) for _ in range(2))
        weight, scale = (interleaved.interleave(*both) for both in zip(gate, up))
        swapped = interleaved.interleave(up[0], gate[0])

        def expected(x=x, gate=gate, up=up):
            halves = [reference(x.float(), *each, None) for each in (gate, up)]
            return interleaved.silu_mul(torch.stack(halves, dim=-1).flatten(-2)).to(x.dtype)

        yield Case(
            f"silu_mul {list(shape)}",
            lambda a=(x, weight, scale): linear(*a, activation="silu_mul"), expected,
            lambda a=(x, swapped, scale): linear(*a, activation="silu_mul"), steps=3,
        )  # fmt: skip


CASES: dict[str, Callable[[Chip], Iterator[Case]]] = {
    "quantize_rows": quantize_rows_cases,
    "norm_quantize": norm_quantize_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "int8": int8_cases,
    "fp8": fp8_cases,
    "persistent_int8": partial(persistent_cases, kind=torch.int8),
    "persistent_fp8": partial(persistent_cases, kind=FP8),
    "long_int8": partial(long_cases, kind=torch.int8),
    "long_fp8": partial(long_cases, kind=FP8),
    "int8_weight_only": partial(weight_only_cases, kind=torch.int8),
    "fp8_weight_only": partial(weight_only_cases, kind=FP8),
    **{f"int4_g{group}": partial(int4_cases, group=group) for group in int4_linear.GROUPS},
    "sparse24": sparse24_cases,
    "int8_sparse24": int8_sparse24_cases,
    "sparse24_mma": sparse24_mma_cases,
    "int8_sparse24_mma": int8_sparse24_mma_cases,
}


def label(shape: tuple[int, int, int], dtype: torch.dtype, config: Config | None) -> str:
    chosen = f" {config}" if config is not None else ""
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}{chosen}"


def quantized_rows(kind: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of x as `scaled_mm` takes them: q, their scales, and for int8 their zero points."""
    if kind == torch.int8:
        q, row_scale, zero = int8_linear.quantize_rows(x)
        return q, row_scale[:, 0].contiguous(), zero[:, 0].contiguous()
    q, row_scale = fp8_linear.quantize_rows(x)
    return q, row_scale[:, 0].contiguous(), None


def altered(weight: Tensor) -> Tensor:
    """An int8 weight with every second row's signs turned; an fp8 one half as large again."""
    if weight.dtype == FP8:
        return (weight.float() * 1.5).to(FP8)
    other = weight.clone()
    other[::2] = -other[::2]
    return other


# ------------------------------------------------------------------------------------------------------------- one check


def quantized(found: tuple, expected: tuple) -> str:
    """Rows of q, scale and zero point. A number that lies between two may go either way: a chip divides by other steps."""
    (q, scale, zero), (exact, exact_scale, exact_zero) = found, expected
    exact_scale = exact_scale[:, 0]
    apart = ((scale - exact_scale).abs() / exact_scale).max().item()
    if not apart <= 1e-6:
        return f"scales differ by {apart:.1e}"
    if q.dtype == FP8:
        # Neighbours in e4m3 are neighbours as integers of sign and magnitude.
        steps = (_ordinal(q) - _ordinal(exact)).abs()
    else:
        steps = ((q.int() - zero[:, None]) - (exact.int() - exact_zero)).abs()
    off = (steps > 0).float().mean().item()
    return "" if steps.max() <= 1 and off <= 2e-3 else f"{off:.2%} of the numbers differ, by up to {int(steps.max())} steps"


def normed(found: tuple, expected: tuple) -> str:
    """A norm and the sum that it is of, which is one addition and so exact."""
    tolerance = TOLERANCE if found[0].is_cuda else INTERPRETED_TOLERANCE
    if not torch.equal(found[1], expected[1]) and (found[0].is_cuda or within(found[1], expected[1], tolerance)):
        return "the sum differs"
    # The reference rounds where the kernel does, but takes the root of another sum.
    return within(found[0], expected[0], tolerance, steps=2)


def _ordinal(values: Tensor) -> Tensor:
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def within(found: Tensor, expected: Tensor, tolerance: dict, steps: int = 1) -> str:
    """What is wrong with `found`, or nothing."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    most, average = (steps * each for each in tolerance[found.dtype])
    # The mean of few numbers is not yet the mean.
    average = max(average, most / found.numel() ** 0.5)
    a, b = found.double(), expected.double()
    if not a.isfinite().all():
        return f"{int((~a.isfinite()).sum())} numbers are not finite"
    largest = ((a - b).abs().max() / b.abs().max()).item()
    mean = ((a - b).square().mean() / b.square().mean()).sqrt().item()
    return "" if largest <= most and mean <= average else f"differs by {largest:.1e}, on average {mean:.1e}"


@contextmanager
def poisoned() -> Iterator[list[Tensor]]:
    """Within, new memory holds NaN or the smallest integer, and has a guard behind it; gives the guards."""
    guards: list[Tensor] = []
    plain = {"empty": torch.empty, "empty_like": torch.empty_like}

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        count = int(torch.Size(shape).numel())
        dtype = dtype or torch.get_default_dtype()
        whole = plain["empty"](count * dtype.itemsize + GUARD, dtype=torch.uint8, device=device)
        # 0xFF: NaN in every float type, e4m3 too; -1 as an integer.
        whole.fill_(0xFF)
        whole[count * dtype.itemsize :] = 0xA5
        guards.append(whole[count * dtype.itemsize :])
        return whole[: count * dtype.itemsize].view(dtype).view(shape)

    torch.empty = empty
    torch.empty_like = lambda t, **options: empty(t.shape, dtype=options.get("dtype", t.dtype), device=t.device)
    try:
        yield guards
    finally:
        torch.empty, torch.empty_like = plain["empty"], plain["empty_like"]


def fault(case: Case, chip: Chip) -> str:
    """What is wrong with the case, or nothing."""
    tolerance = INTERPRETED_TOLERANCE if chip.interpreted else TOLERANCE
    compare = case.compare or (lambda a, b: within(a, b, tolerance, case.steps))
    expected = case.expected()
    with poisoned() as guards:
        first = case.run()
        others = [case.run() for _ in range(case.runs - 1)]
    if wrong := compare(first, expected):
        return wrong
    for guard in guards:
        if (guard != 0xA5).any():
            return "writes behind an output"
    if not all(_same(first, each) for each in others):
        return "two runs differ"
    if chip.device.type == "cuda" and (wrong := replay_fault(case, first)):
        return wrong
    # A few numbers may come out alike by chance.
    many = isinstance(expected, tuple) or expected.numel() >= 32
    if case.wrong is not None and many and not compare(case.wrong(), expected):
        return "the comparison does not see a changed weight"
    return ""


def replay_fault(case: Case, first: Any) -> str:
    """What is wrong when it is captured in a CUDA graph and replayed, its results being erased before, or nothing."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = case.run()
        for _ in range(2):
            for each in _tensors(found):
                if each.data_ptr() not in {t.data_ptr() for t in _tensors(first)}:  # an input that is handed on stays
                    _bits(each).fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            if not _same(first, found):
                return "replayed from a CUDA graph it gives other bits"
    except RuntimeError as error:
        return f"in a CUDA graph: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    return ""


def _tensors(results: Any) -> list[Tensor]:
    return [each for each in (results if isinstance(results, tuple) else (results,)) if each is not None]


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(_bits(one), _bits(other)) for one, other in zip(_tensors(a), _tensors(b), strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- the run


def check(kernel: str, chip: Chip, part: Path | None = None) -> list[dict]:
    """Every case of one kernel, in this process. part: takes each row, a line of JSON, when it is known."""
    rows = []
    for case in CASES[kernel](chip):
        began = time.perf_counter()
        try:
            wrong = fault(case, chip)
        except Exception as error:  # whatever a kernel does, the others are still checked
            lines = str(error).strip().splitlines() or [""]
            wrong = f"{type(error).__name__}: {lines[0][:300]}"
        rows.append({"kernel": kernel, "case": case.label, "fault": wrong, "seconds": round(time.perf_counter() - began, 3)})
        print(f"{'FAIL' if wrong else 'PASS'} {kernel} {case.label}{': ' if wrong else ''}{wrong}", flush=True)
        if part is not None:
            with part.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def apart(kernel: str, limit: float) -> list[dict]:
    """The same in a process of its own. Where it breaks off, what it found before is kept."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "rows"
        limit = max(limit, 1.0)
        command = [sys.executable, "-m", "benchmarks.gpu_checks", "--only", kernel, "--here", "--part", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            # 1: a case failed, and the rows say which.
            why = "" if done.returncode in (0, 1) else f"status {done.returncode}"
            if why or (done.returncode and not part.exists()):
                why = (done.stderr.strip().splitlines() or [why])[-1][:300]
        except subprocess.TimeoutExpired:
            why = f"not over after {limit:.0f} s"
        rows = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    lines = [f"{'FAIL' if row['fault'] else 'PASS'} {kernel} {row['case']}{': ' if row['fault'] else ''}{row['fault']}"
             for row in rows]  # fmt: skip
    if why:
        rows.append({"kernel": kernel, "case": "the process", "fault": f"broke off: {why}"})
        lines.append(f"FAIL {kernel}: broke off: {why}")
    # In one piece: other threads print too.
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
    return rows


def chip_here() -> Chip:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    return Chip(device, capability_of(torch.empty(0, device=device)), interpreted)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(CASES)}, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=150, help="of all kernels, which run at once")
    parser.add_argument("--here", action="store_true", help="all in this process")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        print("not checked: torch finds no CUDA device here", file=sys.stderr)
        return 2
    kernels = options.only.split(",") if options.only else list(CASES)
    if unknown := [name for name in kernels if name not in CASES]:
        parser.error(f"there is no kernel {', '.join(unknown)}: one of {', '.join(CASES)}")
    chip = chip_here()
    if options.part is not None:
        return 1 if any(row["fault"] for name in kernels for row in check(name, chip, options.part)) else 0
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict]] = {}
    if options.here or chip.interpreted:
        for name in kernels:
            found[name] = check(name, chip)
            write(found, kernels, chip, options.out)
    else:
        # They wait for the compiler most of the time, each on a core of its own. All have ended when the time is over.
        with ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
            # The last ones compile the longest.
            running = {pool.submit(lambda name: apart(name, end - time.monotonic()), name): name for name in kernels[::-1]}
            for done in as_completed(running):
                found[running[done]] = done.result()
                write(found, kernels, chip, options.out)
    rows = [row for name in kernels for row in found[name]]
    failed = [row for row in rows if row["fault"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} cases pass on {name_of(chip)}")
    if absent := [name for name in kernels if not found[name]]:
        print(f"no case for this chip: {', '.join(absent)}")
    return 1 if failed else 0


def name_of(chip: Chip) -> str:
    return torch.cuda.get_device_name(chip.device) if chip.device.type == "cuda" else "interpreter"


def write(found: dict[str, list[dict]], kernels: list[str], chip: Chip, out: Path) -> None:
    """gpu-checks-<device>.json, with the kernels that are done."""
    slug = re.sub(r"[^a-z0-9]+", "-", name_of(chip).lower()).strip("-")
    report = {"device": name_of(chip), "capability": chip.capability, "torch": torch.__version__,
              "not_over": [name for name in kernels if name not in found],
              "rows": [row for name in kernels for row in found.get(name, [])]}  # fmt: skip
    part = out / f"gpu-checks-{slug}.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out / f"gpu-checks-{slug}.json")


if __name__ == "__main__":
    sys.exit(main())
