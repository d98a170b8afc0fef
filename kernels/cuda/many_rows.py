"""Products of many rows, which are torch's own with a weight that was made dense, and when they are instead of a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.dispatch import GEMV_ROWS, SKINNY_ROWS
from fxc_kernels.cuda.tile import Config, activate, flat_rows, output_columns


@triton.jit
def activate_kernel(x, out, COUNT, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT: how many numbers x has; out has as many, or half as many for silu_mul."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32)
    if ACTIVATION == "silu_mul":
        gate, up = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
        halved = first // 2 + tl.arange(0, BLOCK // 2)
        tl.store(out + halved, (activate(gate, "silu") * up).to(out.dtype.element_ty), mask=halved < COUNT // 2)
    else:
        tl.store(out + at, activate(values, ACTIVATION).to(out.dtype.element_ty), mask=at < COUNT)


def large_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """torch's own product for many rows, then the activation of what it rounded to x's dtype."""
    columns = output_columns(weight.shape[0], activation)
    product = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    out = product if columns == weight.shape[0] else product.new_empty(x.shape[0], columns)
    if activation != "none" and out.numel():
        grid = (triton.cdiv(product.numel(), 1024),)
        activate_kernel[grid](product, out, product.numel(), ACTIVATION=activation, BLOCK=1024)
    return out


def weight_only_rows(dtype: torch.dtype) -> int:
    """Up to how many rows a weight stays what it is beside float activations. Of float32 ones only few: the tensor cores would
    need three products for each, in more registers than there are."""
    return GEMV_ROWS if dtype == torch.float32 else SKINNY_ROWS


def linear(
    x: Tensor, outputs: int, bias: Tensor | None, activation: str, config: Config | None, most: int,
    dense: Callable[[], Tensor], kernel: Callable[[Tensor, Tensor], None],
) -> Tensor:  # fmt: skip
    """x [..., K] -> [..., N] of x's dtype: up to `most` rows, and wherever a configuration is given, by `kernel`, which takes
    rows [M, K] and fills out [M, N]; beyond, by torch's product with the weight [N, K] that `dense` gives."""
    flat = flat_rows(x)
    out = torch.empty(flat.shape[0], output_columns(outputs, activation), dtype=x.dtype, device=x.device)
    if out.numel() and config is None and flat.shape[0] > most:
        out = large_product(flat, dense(), bias, activation)
    elif out.numel():
        kernel(flat, out)
    return out.reshape(*x.shape[:-1], out.shape[-1])
