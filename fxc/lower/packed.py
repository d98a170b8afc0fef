"""Linear layers for plain eager execution on the CPU, each over a weight that oneDNN packed once.

Every module maps x [..., K] to [..., N] in x's dtype. The int8 ones compute what fxc_kernels.int8_linear defines.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxc_kernels.int8_exact import is_exact, unwatched
from fxc_kernels.int8_linear import INT8_MAX, INT8_MIN, INT8_STEPS, ZERO_ROW

# Rows are gone through in blocks of this many: oneDNN wants hundreds at a time, and temporaries of thousands leave the cache.
BLOCK_ROWS = 512
# A temporary of a block has no more bytes than this, unless that would be fewer than SMALLEST_BLOCK rows.
BLOCK_BYTES = 1 << 24
SMALLEST_BLOCK = 128
# q2 of the split: the remainder of rounding lies in [-1/2, 1/2], so 254 spreads it over the int8 range.
SPLIT = 254.0
# The zero point of the products' activations: what maps -128..127 to 0..255.
UINT8_ZERO = -INT8_MIN


def pack_int8(qweight: Tensor) -> Tensor:
    """int8 [N, K] -> an opaque oneDNN tensor, for `int8_product`."""
    return torch.ops.onednn.qlinear_prepack(qweight.contiguous(), None)


def rounded_to_int8(weight: Tensor, int4_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """float32 int4 weight [N, K], its scales [N, groups] -> (int8 [N, K], scale float32 [N], by what factor the error of int4
    grows, minus 1, judged by steps: rounding errors are as large as they are). Each group counts alike, however small its
    weights, because what they meet may be large; so weights of very different groups are judged worse than they are."""
    scale = symmetric_scales(weight)
    ratio = (scale / int4_scale.float().abs())[(weight != 0).any(dim=1)]
    more = (1 + ratio.square().sum() / max(ratio.numel(), 1)).sqrt() - 1
    return (weight / scale).round_().to(torch.int8), scale.flatten(), more.item()


def int8_product(q: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """((q - 128) @ weight^T) * scale [N], accumulated in int32, returned as float32 [M, N].

    q: uint8 [M, K], an int8 row moved up by UINT8_ZERO: u8 x s8 is what AVX512-VNNI multiplies, and s8 x s8 runs oneDNN's
    reference code on every CPU without AMX. zero_point: the weight's, zeros [N].
    """
    if q.shape[0] == 1 and _single_rows_are_slow():
        return _product(torch.cat([q, q]), packed, scale, zero_point)[:1]
    return _product(q, packed, scale, zero_point)


def _product(q: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, UINT8_ZERO, packed, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def _single_rows_are_slow() -> bool:
    """Whether a single row has to go through as two: with AMX, oneDNN 3.12 takes its reference code for M == 1 and some sizes
    (every layer with N == 256), which is 100 to 1000 times slower."""
    with unwatched():
        packed = pack_int8(torch.ones(256, 256, dtype=torch.int8, device="cpu"))
        scale, zero_point = torch.ones(256, device="cpu"), torch.zeros(256, dtype=torch.int64, device="cpu")
        seconds = []
        for rows in (1, 2):
            q = torch.ones(rows, 256, dtype=torch.uint8, device="cpu")
            _product(q, packed, scale, zero_point)
            calls = []
            for _ in range(3):
                start = time.perf_counter()
                _product(q, packed, scale, zero_point)
                calls.append(time.perf_counter() - start)
            seconds.append(min(calls))
    return seconds[0] > 5 * seconds[1]


@functools.cache
def int8_is_exact() -> bool:
    """Whether `int8_product` is exact in this process: without VNNI oneDNN's saturates (see `fxc_kernels.int8_exact`)."""
    if not torch.backends.mkldnn.is_available():
        return False

    def product_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
        packed, outputs = pack_int8(weight), weight.shape[0]
        scale = torch.ones(outputs, device="cpu")
        zero_point = torch.zeros(outputs, dtype=torch.int64, device="cpu")
        return lambda q: int8_product(to_uint8(q), packed, scale, zero_point)

    return is_exact(product_of)


def to_uint8(q: Tensor) -> Tensor:
    """int8 -> uint8, moved up by UINT8_ZERO."""
    return (q.to(torch.int32) + UINT8_ZERO).to(torch.uint8)


def zero_point_term(qweight: Tensor, scale: Tensor) -> Tensor:
    """-scale * colsum, float32 [1, N]: times a row's zero point, what `int8_product` has too much for that row."""
    return qweight.sum(dim=1, dtype=torch.int32).float().mul_(scale).neg_()[None]


def symmetric_scales(rows: Tensor) -> Tensor:
    """float32 rows [M, K] -> the scale [M, 1] that puts their largest magnitude at 127, or 1 for an all-zero row."""
    scale = rows.abs().amax(dim=-1, keepdim=True)
    zero = scale <= ZERO_ROW
    return scale.div_(INT8_MAX).masked_fill_(zero, 1.0)


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fxc_kernels.int8_linear.quantize_rows` with fewer temporaries; q is moved up to uint8, the zero point stays float32."""
    lo = rows.amin(dim=-1, keepdim=True).clamp_(max=0)
    scale = rows.amax(dim=-1, keepdim=True).clamp_(min=0).sub_(lo)
    zero = scale <= ZERO_ROW
    inverse = scale.div_(INT8_STEPS).masked_fill_(zero, 1.0).reciprocal()
    zero_point = lo.mul_(inverse).neg_().add_(INT8_MIN).round_()
    q = (rows * inverse).round_().add_(zero_point + UINT8_ZERO).clamp_(0, INT8_STEPS)
    return q.to(torch.uint8), scale, zero_point


class _Rows(nn.Module):
    """Goes through the rows block by block, so that a block and what becomes of it stay in the cache.

    activation: applied in float32 to each block of the result.
    """

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = qweight.shape
        self.packed = pack_int8(qweight)
        self.scale = scale
        self.bias = None if bias is None else bias.float()
        self.activation = activation
        self.zero_point = torch.zeros(self.out_features, dtype=torch.int64)
        fitting = BLOCK_BYTES // (4 * max(self.in_features, self.out_features))
        self.block = min(max(SMALLEST_BLOCK, fitting), BLOCK_ROWS)

    def product(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """float32 rows [M, K], M > 0 -> (float32 [M, N] without row scale and bias, row scale [M, 1])."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        out = x.new_empty(count, self.out_features)
        for start in range(0, count, self.block):
            product, scale = self.product(rows[start : start + self.block].float())
            block = out[start : start + self.block]
            last = block if self.activation is None else product
            if self.bias is None:
                torch.mul(product, scale, out=last)
            else:
                torch.addcmul(self.bias, product, scale, out=last)
            if self.activation is not None:
                block.copy_(self.activation(product))
        return out.view(*x.shape[:-1], self.out_features)


class Int8Linear(_Rows):
    """fxc::int8_linear: rows quantized as they come, one int8 product, its zero points taken out, row scale and bias."""

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(qweight, scale, bias, activation)
        self.zero_point_term = zero_point_term(qweight, scale)

    def product(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        q, scale, zero_point = _quantize_rows(rows)
        product = int8_product(q, self.packed, self.scale, self.zero_point)
        return product.addcmul_(zero_point, self.zero_point_term), scale


class SplitLinear(_Rows):
    """fxc::int8_weight_only_linear: x = s * (q1 + q2 / 254) as 2M int8 rows, relative error 3e-5.

    The weights are read once, as int8, and the activations keep 16 bits.
    """

    def product(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        count = rows.shape[0]
        scale = symmetric_scales(rows)
        scaled = rows * scale.reciprocal()
        q = scaled.new_empty(2 * count, self.in_features)
        torch.round(scaled, out=q[:count])
        torch.sub(scaled, q[:count], out=q[count:])
        q[count:].mul_(SPLIT).round_()
        halves = int8_product(q.add_(UINT8_ZERO).to(torch.uint8), self.packed, self.scale, self.zero_point)
        return halves[:count].add_(halves[count:], alpha=1 / SPLIT), scale


class DenseLinear(nn.Module):
    """A float linear layer. A bfloat16 weight is packed by oneDNN, which halves the time of a single row."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.bias = None if bias is None else bias.to(weight.dtype)
        packs = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if packs else None
        self.weight = None if packs else weight

    def forward(self, x: Tensor) -> Tensor:
        out = self._linear(x)
        return out if self.activation is None else self.activation(out)

    def _linear(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class ByRows(nn.Module):
    """`few` up to `limit` rows, `many` above."""

    def __init__(self, few: nn.Module, many: nn.Module, limit: int) -> None:
        super().__init__()
        self.few, self.many, self.limit = few, many, limit

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= self.limit * x.shape[-1]
        return self.few(x) if few else self.many(x)
