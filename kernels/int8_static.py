"""The int8 ops whose activations have one scale from data: ``fxc::int8_static_linear`` and ``fxc::int8_static_conv2d``.

The plain torch functions ``int8_static_linear`` and ``int8_static_conv2d`` are the meaning of the ops: every lowering is judged
against them. Weights are symmetric int8, one float32 scale for each output channel; all of x is rounded by one scale and one
zero point (B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, section 2.1):

    q = clamp(round(x * (1 / x_scale)) + x_zero, 0, 255)      x ~= x_scale * (q - x_zero)
    y[n] = x_scale * scale[n] * sum_k (q[k] - x_zero) * w[n, k] + bias[n]

u8 x s8 is what VNNI multiplies, and x_zero says what the 256 levels are for: 0 where x is never negative, 128 where it is
symmetric. The padding of a convolution is 0, that is x_zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc_kernels.no_gradient import operator
from fxc_kernels.row_scaled import check

LEVELS = 256


def levels(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
    """The level of each number of `x` by the module's formula, as float32 0..255; NaN stays NaN."""
    return (x.float() * (1 / x_scale)).round_().add_(x_zero).clamp_(0, LEVELS - 1)


def check_static(x_scale: float, x_zero: int) -> None:
    """Raise ValueError unless these are a finite positive scale and a level."""
    if not 0 < x_scale < float("inf") or not 0 <= x_zero < LEVELS:
        raise ValueError(f"x_scale has to be positive and finite, and x_zero 0 to {LEVELS - 1}: {x_scale} and {x_zero}")


def check_conv2d(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """x float [B, C, H, W], qweight int8 [N, C / groups, h, w], scale float32 [N], bias [N] or None.

    Raises TypeError on a wrong dtype and ValueError on a wrong shape."""
    if x.dim() != 4 or qweight.dim() != 4:
        raise ValueError(f"x and qweight must have four dimensions: {tuple(x.shape)} and {tuple(qweight.shape)}")
    columns = qweight.flatten(1)
    check(x.new_empty(1, columns.shape[1]), columns, scale, bias, torch.int8)


@operator("fxc::int8_static_linear")
def int8_static_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int
) -> Tensor:
    """Linear layer on int8 weights, all activations rounded by one scale, by the module's formula.

    x [..., K] float32/bfloat16/float16, qweight int8 [N, K], scale float32 [N], bias [N] or None; returns [..., N] in
    x's dtype. Sums are of whole numbers in float32, exact up to 2**24.
    Raises TypeError on a wrong dtype, ValueError on a wrong shape, scale or zero point.
    """
    check(x, qweight, scale, bias, torch.int8)
    check_static(x_scale, x_zero)
    total = torch.nn.functional.linear(levels(x, x_scale, x_zero) - x_zero, qweight.float())
    out = total * (scale * x_scale)
    return (out if bias is None else out + bias.float()).to(x.dtype)


@operator("fxc::int8_static_conv2d")
def int8_static_conv2d(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, x_scale: float, x_zero: int,
) -> Tensor:  # fmt: skip
    """aten::conv2d on int8 weights, all activations rounded by one scale, by the module's formula.

    x [B, C, H, W] float32/bfloat16/float16, qweight int8 [N, C / groups, h, w], scale float32 [N], bias [N] or None;
    returns [B, N, H', W'] in x's dtype. Errors as of `int8_static_linear`.
    """
    check_conv2d(x, qweight, scale, bias)
    check_static(x_scale, x_zero)
    q = levels(x, x_scale, x_zero) - x_zero
    total = torch.nn.functional.conv2d(q, qweight.float(), None, stride, padding, dilation, groups)
    out = total * (scale * x_scale)[:, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(x.dtype)


@int8_static_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> Tensor:
    check(x, qweight, scale, bias, torch.int8)
    check_static(x_scale, x_zero)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@int8_static_conv2d.register_fake
def _(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, x_scale: float, x_zero: int,
) -> Tensor:  # fmt: skip
    check_conv2d(x, qweight, scale, bias)
    check_static(x_scale, x_zero)
    return torch.nn.functional.conv2d(x, qweight.to(x.dtype), None, stride, padding, dilation, groups)
