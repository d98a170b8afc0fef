"""Int8 products of oneDNN over weights that it packed once, and whether they are exact on this CPU."""

import functools
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fxc_kernels.int8_exact import is_exact, unwatched
from fxc_kernels.int8_linear import INT8_MIN

# The zero point of the products' activations: what maps -128..127 to 0..255.
UINT8_ZERO = -INT8_MIN


def pack_int8(qweight: Tensor) -> Tensor:
    """int8 [N, K] -> an opaque oneDNN tensor, int8 [K, N], for `int8_product`."""
    return torch.ops.onednn.qlinear_prepack(qweight.contiguous(), None)


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


def int8_product(q: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """((q - 128) @ weight^T) * scale [N], accumulated in int32, returned as float32 [M, N].

    q: uint8 [M, K], an int8 row moved up by UINT8_ZERO: u8 x s8 is what AVX512-VNNI multiplies, and s8 x s8 runs oneDNN's
    reference code on every CPU without AMX. zero_point: the weight's, zeros [N]. Where such products saturate it is the sum of
    two, of the upper seven bits of q and of the last one, whose pairs fit into 16 bits.
    """
    if q.shape[0] == 1 and single_rows_are_slow():
        return int8_product(torch.cat([q, q]), packed, scale, zero_point)[:1]
    if products_saturate():
        upper = _product(q >> 1, packed, scale, zero_point, UINT8_ZERO // 2)
        return 2 * upper + _product(q & 1, packed, scale, zero_point, 0)
    return _product(q, packed, scale, zero_point)


def _product(q: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, zero: int = UINT8_ZERO) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, zero, packed, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def single_rows_are_slow() -> bool:
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
def products_saturate() -> bool:
    """Whether oneDNN's products of all eight bits are wrong in this process, as they are without VNNI (see
    `fxc_kernels.int8_exact`). False where torch has no oneDNN."""
    return torch.backends.mkldnn.is_available() and not is_exact(_tried(_product))


@functools.cache
def int8_is_exact() -> bool:
    """Whether there is an `int8_product` in this process, and it is exact."""
    return torch.backends.mkldnn.is_available() and (not products_saturate() or is_exact(_tried(int8_product)))


def _tried(product: Callable[..., Tensor]) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def product_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
        packed, outputs = pack_int8(weight), weight.shape[0]
        scale = torch.ones(outputs, device="cpu")
        zero_point = torch.zeros(outputs, dtype=torch.int64, device="cpu")
        return lambda q: product(to_uint8(q), packed, scale, zero_point)

    return product_of


def to_uint8(q: Tensor) -> Tensor:
    """int8 -> uint8, moved up by UINT8_ZERO."""
    return (q.to(torch.int32) + UINT8_ZERO).to(torch.uint8)
