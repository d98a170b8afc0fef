"""Linear layers over rows that are sorted by group, each group with its own weight: a mixture-of-experts layer's experts.

`fxc::grouped_mm` takes the weights as [G, K, N] and is what models are captured with; `fxc::grouped_linear` takes them as
[G, N, K], the layout of a linear layer, which passes work on; `fxc::int8_grouped_linear` has int8 weights and activations.
On a CPU each group is one matrix product. There is no CUDA kernel of fxc's own yet: on CUDA the same products run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fxc_kernels.no_gradient import operator


def grouped_linear_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [T, K], weight [G, N, K], offsets int [G], the end of each group's rows -> [T, N] in x's dtype. Rows at or past
    the last offset belong to no group and are zero, as in `torch.nn.functional.grouped_mm`."""
    return _by_group(torch.nn.functional.linear, x, offsets, weight)


def int8_grouped_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """x [T, K], qweight int8 [G, N, K], scale float32 [G, N], offsets int [G] -> [T, N] in x's dtype: `fxc::int8_linear`
    group by group."""
    return _by_group(lambda *given: torch.ops.fxc.int8_linear(*given, None), x, offsets, qweight, scale)


def _by_group(product: Callable[..., Tensor], x: Tensor, offsets: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """product(rows of one group, its weight, its others), for each."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for end, *constants in zip(offsets.tolist(), weight, *others, strict=True):
        if end > start:
            out[start:end] = product(x[start:end], *constants)
        start = end
    return out


@operator("fxc::grouped_mm")
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_linear_reference` with weight [G, K, N]."""
    return grouped_linear_reference(x, weight.transpose(1, 2), offsets)


@torch.library.custom_op("fxc::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `grouped_linear_reference`."""
    return grouped_linear_reference(x, weight, offsets)


@operator("fxc::int8_grouped_linear")
def int8_grouped_linear(x: Tensor, qweight: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """See `int8_grouped_linear_reference`."""
    return int8_grouped_linear_reference(x, qweight, scale, offsets)


def _rows(x: Tensor, weight: Tensor, inner: int, outer: int) -> Tensor:
    torch._check(x.dim() == 2 and weight.dim() == 3, lambda: "expected rows [T, K] and weights of three dimensions")
    torch._check(x.shape[1] == weight.shape[inner], lambda: f"rows of {x.shape[1]} for weights of {weight.shape[inner]}")
    return x.new_empty(x.shape[0], weight.shape[outer])


grouped_mm.register_fake(lambda x, weight, offsets: _rows(x, weight, 1, 2))
grouped_linear.register_fake(lambda x, weight, offsets: _rows(x, weight, 2, 1))
int8_grouped_linear.register_fake(lambda x, qweight, scale, offsets: _rows(x, qweight, 2, 1))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """dx = dy W and dW = dy^T x, group by group."""
    x, weight, offsets = ctx.saved_tensors
    dx = torch.ops.fxc.grouped_mm(grad, weight, offsets) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        starts = [0, *offsets.tolist()]
        dweight = torch.stack([grad[a:b].t() @ x[a:b] for a, b in itertools.pairwise(starts)])
    return dx, dweight, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)
