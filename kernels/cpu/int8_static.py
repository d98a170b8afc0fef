"""fxc::int8_static_linear and fxc::int8_static_conv2d on a CPU: one int8 product of oneDNN, and behind it what lowering found
there: an activation, a residual sum, the rounding to the levels of whoever reads the result.

x is float, or levels already (uint8). The result is `dtype`, or levels by (y_scale, y_zero) where y_scale is not None. other: a
tensor that is added before the activation, in `dtype` or as levels by (other_scale, other_zero).
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxc_kernels.cpu.int8_product import UINT8_ZERO, single_rows_are_slow, to_uint8
from fxc_kernels.cpu.packed_linear import dense_linear
from fxc_kernels.cpu.rows import activated
from fxc_kernels.int8_exact import is_exact
from fxc_kernels.int8_static import LEVELS, levels

# Activation -> what oneDNN calls it, its numbers, its variant.
POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "hardswish": ("hardswish", [], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


def to_levels(x: Tensor, scale: float, zero: int, factor: Tensor | None = None) -> Tensor:
    """x as levels, uint8, by the formula of `fxc_kernels.int8_static`. factor: float32 [K], what x [..., K] is multiplied by
    instead of 1 / scale, where its channels have scales of their own."""
    if factor is None:
        return levels(x, scale, zero).to(torch.uint8)
    return (x.float() * factor).round_().add_(zero).clamp_(0, LEVELS - 1).to(torch.uint8)


def reach(scale: float, zero: int) -> tuple[float, float]:
    """The least and the largest number that levels stand for."""
    return -zero * scale, (LEVELS - 1 - zero) * scale


def from_levels(q: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    """The numbers that levels stand for."""
    return q.float().sub_(zero).mul_(scale).to(dtype)


def static_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, x_scale: float, x_zero: int,
    dtype: torch.dtype, activation: str = "none", y_scale: float | None = None, y_zero: int = 0,
    dense: Tensor | None = None, limit: int = 0,
) -> Tensor:  # fmt: skip
    """weight: what `pack_int8` gave, or int8 [N, K], which a compiler packs as a constant. dense: the weight as numbers, used
    for up to `limit` rows of x, which is float then."""
    if dense is not None and x.numel() <= limit * x.shape[-1]:
        return activated(dense_linear(x.clamp(*reach(x_scale, x_zero)), dense, bias), activation)
    out = dtype if y_scale is None else torch.uint8
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.empty(*x.shape[:-1], scale.shape[0], dtype=out, device=x.device)
    q = rows if x.dtype == torch.uint8 else to_levels(rows, x_scale, x_zero)
    if is_single := rows.shape[0] == 1 and single_rows_are_slow():
        q = torch.cat([q, q])
    packed = weight if weight.is_mkldnn else torch.ops.fxc_cpu.pack_int8(weight)
    name, numbers, variant = POST_OPS[activation]
    y = torch.ops.onednn.qlinear_pointwise(
        q, x_scale, x_zero, packed, scale, zero_point, bias, y_scale or 1.0, y_zero, out, name, numbers, variant
    )
    return (y[:1] if is_single else y).reshape(*x.shape[:-1], scale.shape[0])


def static_conv2d(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, x_scale: float, x_zero: int,
    dtype: torch.dtype, activation: str = "none", y_scale: float | None = None, y_zero: int = 0,
    other: Tensor | None = None, other_scale: float = 1.0, other_zero: int = 0,
) -> Tensor:  # fmt: skip
    """weight: what `pack_conv2d` gave, or int8 [N, C / groups, h, w], which is packed at the first call; kernel: its height
    and width. The result is channels_last."""
    out = dtype if y_scale is None else torch.uint8
    if x.numel() == 0:
        shape = conv2d_shape(x, scale, kernel, stride, padding, dilation)
        return torch.empty(shape, dtype=out, device=x.device, memory_format=torch.channels_last)
    q = x if x.dtype == torch.uint8 else to_levels(x, x_scale, x_zero)
    q = q.contiguous(memory_format=torch.channels_last)
    if _pads_before(kernel, padding, x_zero):
        q = torch.nn.functional.pad(q, (padding[1], padding[1], padding[0], padding[0]), value=x_zero)
        padding = [0, 0]
    name, numbers, variant = POST_OPS[activation]
    packed = _packed(weight, scale, x_scale, x_zero, stride, padding, dilation, groups)
    given = (q, x_scale, x_zero, packed, scale, zero_point)
    how = (bias, stride, padding, dilation, groups, y_scale or 1.0, y_zero, out)
    if other is None:
        return torch.ops.onednn.qconv2d_pointwise(*given, *how, name, numbers, variant)
    # oneDNN adds onto the other tensor, in the type of the result, and others may read it yet.
    if other.dtype == torch.uint8 and out != torch.uint8:
        other, other_scale, other_zero = from_levels(other, other_scale, other_zero, dtype), 1.0, 0
    elif other.dtype != torch.uint8 and out == torch.uint8:
        raise TypeError("a float tensor cannot be added where the result is levels")
    else:
        other = other.clone(memory_format=torch.channels_last)
    return torch.ops.onednn.qconv2d_pointwise.binary(
        *given, other.contiguous(memory_format=torch.channels_last), *how, other_scale, other_zero, "sum", 1.0, name, numbers,
        variant,
    )  # fmt: skip


def max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool
) -> Tensor:
    """aten::max_pool2d of uint8, which aten itself has not for more than 255 numbers an image."""
    two = (list(each) * (2 // len(each)) for each in (kernel, stride or kernel, padding, dilation))
    return torch.ops.quantized.max_pool2d(x, *two, ceil_mode)


def pack_conv2d(
    qweight: Tensor, scale: Tensor, x_scale: float, x_zero: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """int8 [N, C / groups, h, w] -> an opaque oneDNN tensor for `static_conv2d` with these arguments."""
    padding = [0, 0] if _pads_before(qweight.shape[2:], padding, x_zero) else padding
    return torch.ops.onednn.qconv_prepack(
        qweight.contiguous(), scale, x_scale, x_zero, stride, padding, dilation, groups, None
    )


def _pads_before(kernel: Sequence[int], padding: Sequence[int], x_zero: int) -> bool:
    """Whether the border has to be written out: of a kernel of width 1 oneDNN 3.12 does not pad with the zero point."""
    return x_zero != 0 and any(padding) and 1 in kernel


def conv2d_shape(
    x: Tensor, scale: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The shape of a convolution's result, whose channels are as many as `scale` has."""
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation)
    return [x.shape[0], scale.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)]


# What an operator packed that was given a weight as it is stored, which one for Inductor is.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packed(weight: Tensor, *how: object) -> Tensor:
    if weight.is_mkldnn:
        return weight
    if weight not in _PACKED:
        _PACKED[weight] = pack_conv2d(weight, *how)
    return _PACKED[weight]


@functools.cache
def conv2d_is_exact() -> bool:
    """Whether convolutions of int8 are exact in this process (see `fxc_kernels.int8_exact`)."""
    if not torch.backends.mkldnn.is_available():
        return False

    def product_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
        outputs = weight.shape[0]
        scale, zero_point = torch.ones(outputs, device="cpu"), torch.zeros(outputs, dtype=torch.int32, device="cpu")
        once = ([1, 1], [0, 0], [1, 1], 1)
        packed = pack_conv2d(weight[:, :, None, None], scale, 1.0, UINT8_ZERO, *once)

        def product(q: Tensor) -> Tensor:
            x = to_uint8(q).t()[None, :, None, :]
            y = static_conv2d(x, packed, scale, zero_point, None, [1, 1], *once, 1.0, UINT8_ZERO, torch.float32)
            return y[0, :, 0].t()

        return product

    return is_exact(product_of)
