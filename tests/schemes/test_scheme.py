"""What the records of formats say is what their operators and constants do."""

import pytest
import torch
from torch import nn

from fxc.schemes.int8 import CONV2D
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import EMBEDDING, SCHEMES, product_of, products_for, scheme_of

N, K = 24, 256
EVERY = [(scheme, product) for scheme in SCHEMES.values() for product in scheme.products if product.layer is not CONV2D]
# What is lost where activations are rounded as well, of the norm.
ROUNDED = {None: 1e-5, torch.int8: 0.02, torch.float8_e4m3fn: 0.05}


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def options_of(scheme) -> dict:
    return {option: choices[0] for option, choices in scheme.options.items()}


@pytest.mark.parametrize(("scheme", "product"), EVERY, ids=lambda each: each.name)
def test_an_operator_multiplies_by_what_its_scheme_dequantizes(scheme, product):
    options = options_of(scheme)
    lead = (2,) if product.layer is GROUPED_LINEAR else ()
    parts = scheme.pack(weight().expand(*lead, N, K), **options)
    assert all(tensor.shape[: len(lead) + 1] == (*lead, N) for tensor in parts.values())
    dense = scheme.dense(parts)
    assert dense.shape == (*lead, N, K) and torch.equal(dense, scheme.fake(weight().expand(*lead, N, K), **options))
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(1))
    given = {"x": x, "bias": torch.ones(N), "offsets": torch.tensor([3, 6], dtype=torch.int32)}
    indices = torch.tensor([[3, 0], [N - 1, 3]])
    given |= {**options, **product.learned, **parts, "indices": indices, "dtype": torch.float32}
    names = [argument.name for argument in product.operator._schema.arguments]
    args = [given.get(name) for name in names]
    if product.layer is EMBEDDING:
        assert torch.equal(product.operator(*args), dense[indices])
        assert product.operator(*args[:-1], torch.bfloat16).dtype == torch.bfloat16
        return
    expected = nn.functional.linear(x, dense.reshape(-1, N, K)[0], torch.ones(N) if "bias" in names else None)
    assert (product.operator(*args) - expected).norm() < ROUNDED[product.activations] * expected.norm()
    assert product.arguments(args) == dict(zip(names, args))
    assert scheme_of(product.operator) is scheme and product_of(product.operator) is product
    assert (product.operator in products_for(torch.ops.aten.linear.default)) == (not lead)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda each: each.name)
def test_what_is_packed_is_as_it_was_planned(scheme):
    need, _ = scheme.multiple(**options_of(scheme))
    assert K % need == 0
    for dtype in (torch.float32, torch.bfloat16):
        parts = scheme.pack(weight().to(dtype), **options_of(scheme))
        planned = scheme.pack(weight().to(dtype).to("meta"), **options_of(scheme))
        assert {p: (t.shape, t.dtype) for p, t in parts.items()} == {p: (t.shape, t.dtype) for p, t in planned.items()}
        assert all(t.is_meta for t in planned.values()) and next(iter(parts)) == scheme.numbers
        assert (parts[scheme.numbers].dtype == dtype) is not scheme.is_quantized
        left = scheme.fake(weight().to(dtype), **options_of(scheme))
        assert left.dtype == dtype and ((left == 0).float().mean() >= 0.5) == scheme.is_sparse
        packed_again = scheme.fake(left, **options_of(scheme))
        assert (packed_again - left).float().norm() < 0.06 * left.float().norm()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda each: each.name)
def test_the_numbers_at_the_ends_of_the_range_are_counted(scheme):
    parts = scheme.pack(torch.full((N, K), 2.0), **options_of(scheme))
    expected = {True: 1.0, False: None}[scheme.is_quantized]
    assert scheme.saturation(parts[scheme.numbers]) == expected
    assert scheme.saturation(parts[scheme.numbers][:0]) is None
    if scheme.is_quantized:
        rising = torch.linspace(-1, 1, K).expand(N, K)
        few = scheme.saturation(scheme.pack(rising, **options_of(scheme))[scheme.numbers])
        levels, low, high = scheme.levels(scheme.pack(rising, **options_of(scheme))[scheme.numbers])
        assert 0 < few < 1 and few == sum(v in (low, high) for v in levels.flatten().tolist()) / levels.numel()


def test_all_choices_of_int4_dequantize():
    int4 = SCHEMES["int4"]
    for group in int4.options["group"]:
        for symmetric in int4.options["symmetric"]:
            parts = int4.pack(weight() + 0.5, group=group, symmetric=symmetric)
            assert ("zero" in parts) is not symmetric
            assert (int4.dense(parts) - weight() - 0.5).norm() < 0.15 * (weight() + 0.5).norm()


def test_old_chips_have_no_float8_products_and_are_told_what_to_do():
    refused = {product.name for _, product in EVERY if product.why_not(80)}
    assert refused == {"fp8"} and not any(product.why_not(89) for _, product in EVERY)
    product = product_of(torch.ops.fxc.fp8_linear.default)
    assert product.why_not(86) == "this chip has no float8 products: compute capability 8.6, and they need 8.9"
    assert "weight_only" in product.instead


def test_other_operators_belong_to_no_format():
    assert scheme_of(torch.ops.aten.linear.default) is None and product_of(GROUPED_LINEAR) is None and scheme_of("x") is None
