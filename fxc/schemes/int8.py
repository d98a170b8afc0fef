"""int8 weights: symmetric, one scale per output channel. Their ops are in fxc_kernels.int8_linear and int8_static."""

import torch
from torch import Tensor

from fxc.errors import InputRefused
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import CONV2D, EMBEDDING, Product, Scheme, register
from fxc_kernels import embedding as _embedding  # noqa: F401 - registers its operators
from fxc_kernels import int8_static as _int8_static  # noqa: F401 - registers its operators
from fxc_kernels.cpu import native_int8_quantize as native
from fxc_kernels.int8_linear import INT8_MAX, ZERO_ROW, quantize_rows
from fxc_kernels.int8_static import levels as static_levels

LINEAR = torch.ops.fxc.int8_linear.default
WEIGHT_ONLY = torch.ops.fxc.int8_weight_only_linear.default
GROUPED = torch.ops.fxc.int8_grouped_linear.default
LOOKUP = torch.ops.fxc.int8_embedding.default
STATIC = torch.ops.fxc.int8_static_linear.default
STATIC_CONV2D = torch.ops.fxc.int8_static_conv2d.default
_NORMAL = {"x_scale": 0.04, "x_zero": 128}


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [N, K] (any float dtype) to int8 [N, K] with a float32 scale [N].

    scale = amax(|row|) / 127, or 1 for an all-zero row (and for K == 0), so |weight - qweight * scale| <= scale / 2 up
    to float32 rounding. Raises InputRefused when the weight is not a float matrix or holds NaN or Inf.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputRefused(
            "only a floating-point matrix can become an int8 weight",
            why=f"this one is {weight.dtype} with shape {tuple(weight.shape)}",
        )
    rows, columns = weight.shape
    if weight.numel() == 0:
        return weight.new_empty(rows, columns, dtype=torch.int8), weight.new_ones(rows, dtype=torch.float32)
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and native.why_not() is None:
        made = native.quantize(weight.contiguous(), ZERO_ROW)
        if made is not None:
            return made
    # float64 has numbers beyond float32: they are Inf here, and refused.
    values = weight.float()
    amax = values.abs().amax(dim=1)
    if not torch.isfinite(amax).all():
        bad = int((~torch.isfinite(amax)).sum())
        raise InputRefused(
            "the weight holds NaN or Inf, which int8 cannot express",
            why=f"{bad} of its {rows} output channels are affected",
            hint="check the checkpoint, or leave this layer out with skip=",
        )
    scale = torch.where(amax <= ZERO_ROW, 1.0, amax / INT8_MAX)
    return (values / scale[:, None]).round_().to(torch.int8), scale


def dequantize(qweight: Tensor, scale: Tensor) -> Tensor:
    """qweight int8 [N, K] times scale float32 [N], float32 [N, K]."""
    return qweight.float() * scale[:, None]


def rounded_rows(x: Tensor) -> Tensor:
    """x [..., K] as `fxc::int8_linear` rounds it, row by row, float32."""
    q, scale, zero_point = quantize_rows(x.reshape(-1, x.shape[-1]))
    return ((q.float() - zero_point) * scale).view(x.shape)


def rounded_by(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
    """x of any shape as the static products round it, float32."""
    return (static_levels(x, x_scale, x_zero) - x_zero) * x_scale


def levels(qweight: Tensor) -> tuple[Tensor, int, int]:
    """What `Scheme.levels` is of int8."""
    return qweight, -INT8_MAX, INT8_MAX


SCHEME = register(
    Scheme(
        name="int8",
        label="int8",
        parts={"qweight": None, "scale": "scales"},
        products=(
            Product(LINEAR, "int8", "int8 linear", activations=torch.int8, rounded=rounded_rows),
            Product(STATIC, "int8_static", "int8 linear", activations=torch.int8, learned=_NORMAL, rounded=rounded_by),
            Product(
                STATIC_CONV2D,
                "int8_static_conv2d",
                "int8 convolution",
                layer=CONV2D,
                activations=torch.int8,
                learned=_NORMAL,
                rounded=rounded_by,
            ),
            Product(WEIGHT_ONLY, "int8_weight_only", "int8 linear"),
            Product(
                GROUPED, "int8_grouped", "int8 experts", layer=GROUPED_LINEAR, activations=torch.int8, rounded=rounded_rows
            ),
            Product(LOOKUP, "int8_embedding", "int8 embedding", layer=EMBEDDING),
        ),
        quantize=quantize_weight,
        dequantize=dequantize,
        levels=levels,
        stored=lambda levels, parts: levels.to(torch.int8),
    )
)
