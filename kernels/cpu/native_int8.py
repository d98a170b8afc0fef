"""fxc::int8_linear and fxc::int8_weight_only_linear on a CPU in one call: int8_linear.cpp quantizes the rows, multiplies and
finishes, so that between float rows and float results nothing goes through the memory."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxc_kernels.cpu import native
from fxc_kernels.cpu.native import pointer
from fxc_kernels.cpu.packed_linear import dense_linear
from fxc_kernels.cpu.rows import activated

PANEL = 16
# Outputs that are packed at once, so that what they become on the way takes little memory.
AT_ONCE = 4096
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def pack(qweight: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """int8 [N, K], float32 [N], [N] -> what int8_linear.cpp reads: (int8 [N/16, K/4, 64], scale, the rows' sums int32, bias
    float32), all filled up with zeros."""
    rows, columns = qweight.shape
    more, quads = -rows % PANEL, -(-columns // 4)
    panels = qweight.new_empty((rows + more) // PANEL, quads, PANEL, 4)
    sums = torch.zeros(rows + more, dtype=torch.int32)
    for start in range(0, rows, AT_ONCE):
        part = qweight[start : start + AT_ONCE]
        sums[start : start + len(part)] = part.sum(dim=1, dtype=torch.int32)
        full = pad(part, (0, 4 * quads - columns, 0, -len(part) % PANEL)).view(-1, PANEL, quads, 4)
        panels[start // PANEL :][: len(full)] = full.transpose(1, 2)
    return panels.flatten(2), pad(scale, (0, more)), sums, None if bias is None else pad(bias.float(), (0, more))


@functools.cache
def _functions(level: str) -> tuple[Callable, Callable]:
    at, number = ctypes.c_void_p, ctypes.c_int
    return native.linear_functions("int8_linear", level, (at, at, at, at, number))


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_functions)


def native_int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, outputs: int, split: bool,
    activation: str = "none", dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """x [..., K] float32 or bfloat16 -> [..., outputs]. weight, scale, sums, bias: of `pack`. split: each row as two rows of
    int8, whose error is 3e-5, instead of one. dense: see ops.py; used above `limit` rows with `split`, and up to it without."""
    if dense is not None and (x.numel() > limit * x.shape[-1]) is split:
        return activated(dense_linear(x, dense, None if bias is None else bias[:outputs]), activation)
    weights = weight.data_ptr(), scale.data_ptr(), sums.data_ptr(), pointer(bias), ACTIVATIONS.index(activation)
    return native.linear(_functions(native.level()), x, outputs, split, *weights)
