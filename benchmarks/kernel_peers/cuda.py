"""gemlite, torchao and cuSPARSELt on one layer of a GPU. All are optional."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fxc.kernel_bench.contender import HALF, INT8, Bind, Contender, of_function
from fxc.kernel_bench.weights import Weights, group_of, known, quantize_symmetric
from fxc_kernels import int4_linear
from fxc_kernels.sparse24_linear import unpack

# The largest error (see `fxc.kernel_bench.contender`) of libraries that quantize a float weight once more, as they like.
OWN = 0.15
# _cslt_sparse_mm takes multiples of 8 or 16 rows.
SPARSE_ROWS = 16


def contenders(schemes: tuple[str, ...], capability: int) -> list[Contender]:
    return [each for scheme in schemes for each in _of_scheme(scheme, capability)]


def _of_scheme(scheme: str, capability: int) -> list[Contender]:
    if scheme == "int8":
        return [
            gemlite("gemlite int8", scheme, "int8", _gemlite_dynamic("A8W8_int8_dynamic"), OWN),
            torchao("torchao int8", scheme, "int8", "Int8DynamicActivationInt8WeightConfig", OWN),
        ]
    if scheme == "fp8":
        absent = known(scheme).product.why_not(capability)
        return [
            gemlite("gemlite fp8", scheme, "fp8", _gemlite_dynamic("A8W8_fp8_dynamic"), OWN, absent),
            torchao("torchao fp8", scheme, "fp8", "Float8DynamicActivationFloat8WeightConfig", OWN, absent),
        ]
    if scheme == "int8_weight_only":
        return [
            gemlite("gemlite int8 weights", scheme, "int8", _gemlite_dynamic("A16W8"), OWN),
            torchao("torchao int8 weights", scheme, "int8", "Int8WeightOnlyConfig", OWN),
        ]
    if scheme.startswith("int4"):
        return [
            gemlite("gemlite int4", scheme, scheme, _gemlite_int4, 2 * HALF, holds=0.6),
            torchao("torchao int4", scheme, scheme, "Int4WeightOnlyConfig", OWN, group_size=group_of(scheme)),
        ]
    if scheme == "sparse24":
        return [Contender("cuSPARSELt", scheme, "sparse24", _cusparselt, HALF, absent=_no_cusparselt(), holds=1.2)]
    if scheme == "int8_sparse24":
        return [Contender("cuSPARSELt int8", scheme, scheme, _cusparselt_int8, INT8, absent=_no_cusparselt(), holds=0.7)]
    return []


def _no_cusparselt() -> str | None:
    if getattr(torch.backends, "cusparselt", None) is None or not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return None


def _sparse_mm(compressed: Tensor, padded: Tensor, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """x^T [K, M] -> (W x^T)^T [M, N], by the algorithm that is fastest for such an x."""
    options = {"transpose_result": True} | ({} if dtype is None else {"out_dtype": dtype})
    best = torch._cslt_sparse_mm_search(compressed, padded, **options)
    return lambda x: torch._cslt_sparse_mm(compressed, x, alg_id=best, **options)


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -x.shape[0] % SPARSE_ROWS))


def _cusparselt(weights: Weights) -> Bind:
    compressed = torch._cslt_compress(weights.dense().bfloat16())

    def bind(x: Tensor):
        product = _sparse_mm(compressed, _padded(x).t(), None)
        return lambda: product(_padded(x).t())[: x.shape[0]]

    return bind


def _cusparselt_int8(weights: Weights) -> Bind:
    compressed, scale = torch._cslt_compress(unpack(weights.parts[0], weights.parts[1])), weights.parts[2]

    def bind(x: Tensor):
        product = _sparse_mm(compressed, _padded(quantize_symmetric(x)[0]).t(), torch.int32)

        def call() -> Tensor:
            q, row_scale = quantize_symmetric(x)
            return (product(_padded(q).t())[: x.shape[0]] * scale * row_scale).to(x.dtype)

        return call

    return bind


def gemlite(
    name: str, scheme: str, kind: str, build: Callable[[Weights], Bind], tolerance: float, absent: str | None = None,
    holds: float = 1.0,
) -> Contender:  # fmt: skip
    return Contender(name, scheme, kind, build, tolerance, needs=("gemlite",), absent=absent, holds=holds)


def _gemlite_dynamic(helper: str) -> Callable[[Weights], Bind]:
    """It quantizes a float weight itself."""

    def build(weights: Weights) -> Bind:
        from gemlite import helper as helpers

        return of_function(getattr(helpers, helper)(device=str(weights.device)).from_weights(weights.dense().bfloat16()))

    return build


def _gemlite_int4(weights: Weights) -> Bind:
    from gemlite import helper as helpers

    qweight, scale = weights.parts[:2]
    zeros = torch.full_like(scale, int4_linear.MIDDLE)
    layer = helpers.A16Wn(device=str(weights.device)).from_weights(
        int4_linear.unpack(qweight), scale, zeros, 4, group_of(weights.format), None
    )
    return of_function(layer)


@functools.cache
def _compiled_linear() -> Callable[[Tensor, Tensor], Tensor]:
    """One for all weights and sizes, which it compiles anew only until it has a graph for any size."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(product, fullgraph=True)


def torchao(
    name: str, scheme: str, kind: str, config: str, tolerance: float, absent: str | None = None, **options: int
) -> Contender:
    """It quantizes a float weight itself, and is compiled, as its documentation asks for."""

    def build(weights: Weights) -> Bind:
        import torchao.quantization

        layer = torch.nn.Linear(weights.k, weights.n, bias=False, device="meta", dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(weights.dense().bfloat16(), requires_grad=False)
        torchao.quantization.quantize_(layer, getattr(torchao.quantization, config)(**options))
        return of_function(lambda x: _compiled_linear()(x, layer.weight))

    return Contender(name, scheme, kind, build, tolerance, needs=("torchao",), absent=absent, holds=1)
