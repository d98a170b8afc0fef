"""Linear layers for Inductor on the CPU: plain functions that are traced into the graph.

What surrounds the products (quantize, rescale, bias, and with them the residual, normalization or activation of the
model) is ordinary torch code, which Inductor fuses. The products are oneDNN calls over weights that freezing packs.
"""

import weakref

import torch
from torch import Tensor

from fxc.lower.packed import SPLIT, UINT8_ZERO, int8_product, pack_int8, symmetric_scales
from fxc_kernels.int8_linear import INT8_STEPS, row_parameters

# Each specialization of a compiled program folds its own constants; they all share one packed copy of a weight.
_PACKED: dict[tuple[int, int, int], tuple[weakref.ref, weakref.ref]] = {}


def _pack_once(qweight: Tensor) -> Tensor:
    key = (qweight.data_ptr(), *qweight.shape)
    for known in [k for k, (source, packed) in _PACKED.items() if source() is None or packed() is None]:
        del _PACKED[known]
    if key in _PACKED:
        packed = _PACKED[key][1]()
        if packed is not None:
            return packed
    packed = pack_int8(qweight)
    _PACKED[key] = (weakref.ref(qweight), weakref.ref(packed))
    return packed


torch.library.define("fxc_cpu::pack_int8", "(Tensor qweight) -> Tensor")
torch.library.impl("fxc_cpu::pack_int8", "cpu", _pack_once)
# oneDNN's tensors have no fake form. To the shape rules of the product a packed weight is an int8 [K, N].
torch.library.register_fake("fxc_cpu::pack_int8", lambda qweight: qweight.new_empty(qweight.shape[1], qweight.shape[0]))


def _product(q: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return int8_product(q, torch.ops.fxc_cpu.pack_int8(qweight), scale, zero_point)


def _stored(row_value: Tensor) -> Tensor:
    """row_value [M, 1], computed once per row: Inductor would repeat its division for every vector that uses it."""
    from torch._inductor import inductor_prims  # seconds to import, and eager does without

    return inductor_prims.force_stride_order(row_value, (1, 1))


def _finish(out: Tensor, row_scale: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    out = out * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


def int8_linear(x, qweight, scale, zero_point, bias, zero_point_term):
    """fxc::int8_linear. zero_point: the weight's, zeros [N]; zero_point_term: see fxc.lower.packed.

    The product is written as float32: bfloat16 would round it before the rows' zero points are taken out, where it can
    be many times larger than the result, and was not faster.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], qweight.shape[0])
    row_scale, inverse, row_zero_point = map(_stored, row_parameters(rows))
    # `round_rows` moved up to uint8: whole numbers of float32 are moved exactly, and clamped as integers it compiles better.
    q = ((rows.float() * inverse).round() + (row_zero_point + UINT8_ZERO)).to(torch.int32)
    q = q.clamp(0, INT8_STEPS).to(torch.uint8)
    out = _product(q, qweight, scale, zero_point) + row_zero_point * zero_point_term
    return _finish(out, row_scale, x, bias)


def int8_or_dense(x, qweight, scale, zero_point, bias, zero_point_term, weight, limit):
    """Up to `limit` rows a float linear over `weight`, above that `int8_linear`."""
    if x.numel() <= limit * x.shape[-1]:
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return int8_linear(x, qweight, scale, zero_point, bias, zero_point_term)


def split_linear(x, qweight, scale, zero_point, bias):
    """fxc::int8_weight_only_linear as two int8 products (see fxc.lower.packed)."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], qweight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scale = symmetric_scales(rows)
    scaled = rows * row_scale.reciprocal()
    first = scaled.round()
    rest = ((scaled - first) * SPLIT).round()
    halves = _product((torch.cat([first, rest]) + UINT8_ZERO).to(torch.uint8), qweight, scale, zero_point)
    count = rows.shape[0]
    return _finish(halves[:count] + halves[count:] * (1 / SPLIT), row_scale, x, bias)


def split_or_dense(x, qweight, scale, zero_point, bias, weight, limit):
    """`split_linear` up to `limit` rows, a float linear over `weight` above."""
    if x.numel() == 0 or x.numel() > limit * x.shape[-1]:
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return split_linear(x, qweight, scale, zero_point, bias)


# erf(x) = x * P(x^2) / Q(x^2) on [-4, 4], the coefficients of Eigen's float32 erf (unsupported/SpecialFunctions, 3.3).
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Exact GELU with a rational erf: as near to the true value as torch's (2e-6), at a third of the instructions.

    Inductor evaluates the activation twice when its result is quantized, for the row maximum and for the integers.
    """
    if approximate != "none":
        return torch.nn.functional.gelu(x, approximate=approximate)
    value = x.float()
    y = (value * 0.5**0.5).clamp(-4, 4)
    square = y * y
    erf = y * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square)
    return (0.5 * value * (1 + erf)).to(x.dtype)
