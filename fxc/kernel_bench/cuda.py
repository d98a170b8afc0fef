"""What runs on a GPU: fxc's Triton kernels and torch's own products.

A row "kernel only" leaves out the quantization of activations, which a norm or an activation before the layer can do on its
way; the row without these words has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fxc.kernel_bench.contender import FP8, HALF, INT8, Bind, Contender, int8pack, of_function
from fxc.kernel_bench.weights import Weights, format_of, group_of, known, quantize_symmetric
from fxc_kernels.fp8_linear import quantize_rows as quantize_fp8

# torch._int_mm takes more rows than 16.
LEAST_ROWS = 32
# Weights, made ready once -> what takes x and, as config=, a configuration or None for the kernel's own choice.
Kernel = Callable[[Weights], Callable[..., Tensor]]


def contenders(schemes: tuple[str, ...], capability: int) -> list[Contender]:
    """The dense baseline and everything that computes one of `schemes` on a chip of this compute capability (90: an H200)."""
    found = [Contender("cuBLAS bf16", "bf16", "dense", _dense, HALF, baseline=True)]
    for scheme in schemes:
        found += _of_scheme(scheme, capability)
    return found


def _of_scheme(scheme: str, capability: int) -> list[Contender]:
    absent = known(scheme).product.why_not(capability)
    made = [_ours(f"fxc {scheme}", scheme, capability)]
    if scheme == "int8":
        made += [
            Contender("fxc int8, kernel only", scheme, "int8", _scaled_only(torch.int8), INT8, x_size=1, ours=True, holds=1),
            Contender("torch._int_mm + scale", scheme, "int8", partial(_int_mm, False), INT8, holds=1),
            Contender("torch._int_mm + scale, kernel only", scheme, "int8", partial(_int_mm, True), INT8, x_size=1, holds=1),
        ]
    elif scheme == "fp8":
        scaled = {"tolerance": FP8, "x_size": 1, "absent": absent, "holds": 1}
        made += [
            Contender("fxc fp8, kernel only", scheme, "fp8", _scaled_only(torch.float8_e4m3fn), ours=True, **scaled),
            Contender("torch._scaled_mm row-wise, kernel only", scheme, "fp8", partial(_scaled_mm, True), **scaled),
            Contender("torch._scaled_mm row-wise", scheme, "fp8", partial(_scaled_mm, False), FP8, absent=absent, holds=1),
            Contender("torch._scaled_mm tensor-wise, kernel only", scheme, "fp8", _scaled_mm_tensor,
                      **scaled | {"tolerance": 2 * FP8}),
        ]  # fmt: skip
    elif scheme == "int8_weight_only":
        made.append(Contender("torch _weight_int8pack_mm", scheme, "int8", int8pack, HALF, holds=1))
    elif scheme.startswith("int4"):
        zero = _ours(f"fxc {scheme} with zero points", scheme, capability, kind=f"{scheme}_zero")
        made += [zero, Contender("torch _weight_int4pack_mm", scheme, scheme, _int4pack, HALF, holds=0.6)]
    elif scheme == "sparse24":
        made.append(_ours("fxc sparse24, made dense in registers", scheme, capability, _sparse24_decompressed))
    elif scheme == "int8_sparse24":
        made.append(_ours("fxc int8_sparse24, made dense in registers", scheme, capability, _int8_sparse24_decompressed))
    return made


# ------------------------------------------------------------------------------------------------------------------- fxc's


def _ours(name: str, scheme: str, capability: int, kernel: Kernel | None = None, *, kind: str = "") -> Contender:
    """The kernel as a model calls it."""
    made = kernel or kernel_of(scheme)
    why_not = known(scheme).product.why_not(capability) if made else "fxc has no CUDA kernel for it"
    return Contender(
        name, scheme, kind or format_of(scheme), lambda weights: of_function(made(weights)), tolerance_of(scheme),
        ours=True, holds=1.2, absent=why_not,
    )  # fmt: skip


def tuned(scheme: str, config: object) -> Contender:
    """The kernel with a configuration; `build` is for weights that `kernel_of(scheme)` has made ready already."""
    return Contender(
        f"fxc {scheme}, tuned", scheme, format_of(scheme), lambda ready: of_function(partial(ready, config=config)),
        tolerance_of(scheme), ours=True, form=lambda bind: str(config) if config else "",
    )  # fmt: skip


def kernel_of(scheme: str) -> Kernel | None:
    return KERNELS.get("int4" if scheme.startswith("int4") else scheme)


def tolerance_of(scheme: str) -> float:
    return {torch.int8: INT8, torch.float8_e4m3fn: FP8}.get(known(scheme).product.activations, HALF)


def _int8(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.scaled_mm import int8_linear

    qweight, scale = weights.parts
    return partial(_call, int8_linear, qweight, scale, column_sum=qweight.sum(dim=1, dtype=torch.int32))


def _fp8(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.scaled_mm import fp8_linear

    return partial(_call, fp8_linear, *weights.parts)


def _weight_only(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.weight_only import weight_only_linear

    return partial(_call, weight_only_linear, *weights.parts)


def _int4(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.int4_linear import int4_weight_only_linear, prepack

    group = group_of(weights.format)
    packed = prepack(weights.parts[0], group)
    zero = weights.parts[2] if len(weights.parts) == 3 else None
    return partial(_call, int4_weight_only_linear, packed, weights.parts[1], zero, None, group)


def _sparse24(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.sparse24_prepacked import prepack
    from fxc_kernels.cuda.sparse24_prepacked_linear import prepacked_linear

    return partial(_call, prepacked_linear, prepack(*weights.parts))


def _int8_sparse24(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.sparse24_prepacked import prepack, row_sums
    from fxc_kernels.cuda.sparse24_prepacked_linear import int8_prepacked_linear

    values, meta, scale = weights.parts
    packed = prepack(values, meta)
    return partial(_call, int8_prepacked_linear, packed, scale, column_sum=row_sums(packed))


def _sparse24_decompressed(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.sparse24 import sparse24_linear

    return partial(_call, sparse24_linear, *weights.parts)


def _int8_sparse24_decompressed(weights: Weights) -> Callable[..., Tensor]:
    from fxc_kernels.cuda.sparse24 import int8_sparse24_linear
    from fxc_kernels.sparse24_linear import unpack

    sums = unpack(weights.parts[0], weights.parts[1]).sum(dim=1, dtype=torch.int32)
    return partial(_call, int8_sparse24_linear, *weights.parts, column_sum=sums)


def _call(function: Callable, *arguments, **options) -> Tensor:
    """`function` with x, which comes last here, as its first argument."""
    *constants, x = arguments
    return function(x, *constants, **options)


KERNELS: dict[str, Kernel] = {
    "int8": _int8,
    "fp8": _fp8,
    "int8_weight_only": _weight_only,
    "fp8_weight_only": _weight_only,
    "int4": _int4,
    "sparse24": _sparse24,
    "int8_sparse24": _int8_sparse24,
}


def _scaled_only(dtype: torch.dtype) -> Callable[[Weights], Bind]:
    """The product alone: rows were quantized before."""

    def build(weights: Weights) -> Bind:
        from fxc_kernels.cuda.quantize_rows import quantize_rows
        from fxc_kernels.cuda.scaled_mm import scaled_mm

        qweight, scale = weights.parts
        sums = qweight.sum(dim=1, dtype=torch.int32) if dtype == torch.int8 else None

        def bind(x: Tensor):
            q, row_scale, zero = quantize_rows(x, dtype)
            return partial(scaled_mm, q, row_scale, zero, qweight, scale, column_sum=sums, dtype=x.dtype)

        return bind

    return build


# ----------------------------------------------------------------------------------------------------------------- torch's


def _dense(weights: Weights) -> Bind:
    weight = weights.dense().bfloat16()
    return of_function(lambda x: linear(x, weight))


def _int_mm(kernel_only: bool, weights: Weights) -> Bind:
    qweight, scale = weights.parts
    transposed = qweight.t()

    def product(q: Tensor, row_scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        return (torch._int_mm(q, transposed)[:rows] * scale * row_scale).to(dtype)

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        q, row_scale = quantize_symmetric(x)
        return pad(q, (0, 0, 0, max(LEAST_ROWS - q.shape[0], 0))), row_scale

    if kernel_only:
        return lambda x: partial(product, *quantized(x), x.shape[0], x.dtype)
    return of_function(lambda x: product(*quantized(x), x.shape[0], x.dtype))


def _scaled_mm(kernel_only: bool, weights: Weights) -> Bind:
    qweight, scale = weights.parts[0].t(), weights.parts[1][None, :]

    def product(q: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
        return torch._scaled_mm(q, qweight, row_scale, scale, out_dtype=dtype, use_fast_accum=True)

    if kernel_only:
        return lambda x: partial(product, *quantize_fp8(x), x.dtype)
    return of_function(lambda x: product(*quantize_fp8(x), x.dtype))


def _scaled_mm_tensor(weights: Weights) -> Bind:
    """One scale for the whole weight and one for all of x: the weight is rounded again for that."""
    dense = weights.dense()
    scale = dense.abs().amax() / 448
    qweight = (dense / scale).to(torch.float8_e4m3fn).t()

    def bind(x: Tensor):
        x_scale = x.float().abs().amax() / 448
        q = (x.float() / x_scale).to(torch.float8_e4m3fn)
        return partial(torch._scaled_mm, q, qweight, x_scale, scale, out_dtype=x.dtype, use_fast_accum=True)

    return bind


def _int4pack(weights: Weights) -> Bind:
    qweight, scale = weights.parts[:2]
    group = group_of(weights.format)
    # Here the even k is in the high half of a byte.
    swapped = (qweight << 4) | (qweight >> 4)
    converted = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return of_function(lambda x: torch.ops.aten._weight_int4pack_mm(x, converted, group, scale_and_zero))
