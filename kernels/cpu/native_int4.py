"""fxc::int4_weight_only_linear and those of 3 and 2 bits on a CPU: int4_linear.cpp over weights that stay four bits.

x is rounded to int8 by runs of RUN numbers, or of a group where that is less. That costs less than INT4_AS_INT8 of
fxc/lower/candidates.py whatever x is: of a run that one number dominates, the rounding of the others weighs at most

    sqrt(RUN) * (1 / 254) / sqrt(3) * rms(w)     against     step(w) / sqrt(12),  the error of the one weight it meets,

0.17 of it for the weights of a normal distribution, 1.4 % in the root of the sum of squares; of a run without outliers, 0.2 %.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxc_kernels.cpu import native
from fxc_kernels.cpu.native import pointer
from fxc_kernels.int4_linear import MIDDLE

PANEL = 16
RUN = 64
# Outputs that are packed at once.
AT_ONCE = 4096


def pack(
    levels: Callable[[slice], Tensor], bits: int, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """levels: rows -> uint8 [rows, K] of so many bits; scale [N, K/group] float32 or bfloat16; zero uint8, as scale, or None
    for the middle. Gives what int4_linear.cpp reads: uint8 [N/16, K/8, 64], scale [N/16, K/group, 16], zero as scale, filled up
    with zeros. Levels are asked for in parts, so that they never take more memory than what is made of them."""
    outputs, more = scale.shape[0], -scale.shape[0] % PANEL
    panels: Tensor | None = None
    for start in range(0, outputs, AT_ONCE):
        q = levels(slice(start, start + AT_ONCE))
        if zero is None:
            q = q + (MIDDLE - (1 << bits - 1))
        blocks = pad(q, (0, 0, 0, -len(q) % PANEL)).view(-1, PANEL, q.shape[1] // 8, 2, 4)
        if panels is None:
            panels = q.new_empty((outputs + more) // PANEL, q.shape[1] // 8, PANEL, 4)
        panels[start // PANEL :][: len(blocks)] = (blocks[..., 0, :] | blocks[..., 1, :] << 4).transpose(1, 2)

    def beside(each: Tensor) -> Tensor:
        return pad(each, (0, 0, 0, more)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()

    scale = scale if scale.dtype == torch.bfloat16 else scale.float()
    return panels.flatten(2), beside(scale), None if zero is None else beside(zero)


@functools.cache
def _functions(level: str) -> tuple[Callable, Callable]:
    at, number = ctypes.c_void_p, ctypes.c_int
    return native.linear_functions("int4_linear", level, (at, at, number, at, at))


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_functions)


def native_int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, outputs: int, group: int
) -> Tensor:
    """x [..., K] float32 or bfloat16 -> [..., outputs]. weight, scale, zero: of `pack`; bias: float32 [outputs] or None."""
    weights = weight.data_ptr(), scale.data_ptr(), scale.dtype == torch.bfloat16, pointer(zero), pointer(bias)
    return native.linear(_functions(native.level()), x, outputs, group, *weights)
