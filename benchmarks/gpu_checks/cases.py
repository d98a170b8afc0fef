"""Of each kernel the cases that are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_checks.chip import Chip
from benchmarks.gpu_checks.fault import FP8, Case, normed, quantized
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
from fxc_kernels.cuda.tile import Config

GATED = ((1, 18944, 3584), (33, 1001, 264), (2048, 4736, 3584))
PERSISTENT = ((130, 33, 144), (2049, 3584, 18944))
NORMED, NORMED_ROWS = (1, 33, 1000, 3584, 8192, 29568), 2049
# A long K, where warps that read what others have not written yet would show; each so many times.
LONG = ((1000, 4096, 29568), (2048, 4096, 29568))
LONG_RUNS = 12


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
        scale[::2] *= -1
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
