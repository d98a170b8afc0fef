"""The kernels in C++ against the definitions of their operators, at every level that this CPU has."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fxc.schemes import int4
from fxc_kernels.cpu import native, native_attention, native_int4, native_int8
from fxc_kernels.cpu.rows import activated
from fxc_kernels.int8_linear import int8_linear_reference, int8_weight_only_linear_reference

HERE = [name for name, (_, needs) in native.LEVELS.items() if set(needs.split()) <= native._abilities()]
ROWS = (1, 2, 5, 7, 13, 400)


@pytest.fixture(autouse=True, params=HERE or ["none"])
def level(request, monkeypatch):
    monkeypatch.setenv("FXC_CPU_LEVEL", request.param)
    if request.param == "none":
        pytest.skip("this CPU runs none of them")
    return request.param


def distance(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-2)).item()


def packed_int4(qweight, scale, zero=None, bits=4):
    return native_int4.pack(lambda rows: int4.unpack(qweight[rows], bits), bits, scale, zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "columns"), [(96, 256), (50, 37), (17, 128), (3, 5), (64, 9000)])
def test_int8_is_what_the_operators_say(level, outputs, columns, dtype):
    torch.manual_seed(0)
    qweight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
    scale, bias = torch.rand(outputs) / 1000, torch.randn(outputs)
    packed = native_int8.pack(qweight, scale, bias)
    for rows in ROWS:
        x = (torch.randn(rows, columns) * torch.rand(rows, 1) + torch.rand(rows, 1)).to(dtype)
        for split, reference, near in (
            (False, int8_linear_reference, 1e-5), (True, int8_weight_only_linear_reference, 1e-4)
        ):  # fmt: skip
            for activation in native_int8.ACTIVATIONS:
                y = native_int8.native_int8_linear(x, *packed, outputs, split, activation)
                expected = activated(reference(x.float(), qweight, scale, bias), activation)
                assert y.dtype == dtype and y.shape == expected.shape
                assert distance(y, expected) < (near if dtype == torch.float32 else 4e-3), (rows, split, activation)


def test_rows_are_rounded_to_the_same_integers(level):
    """Where weights pick one column each, a result is that integer: none may differ by a step."""
    torch.manual_seed(0)
    x = torch.randn(64, 48) * 10 ** torch.linspace(-20, 20, 64)[:, None]
    x[3], x[4, 0] = 0, 1e30
    weight, ones = torch.eye(48, dtype=torch.int8), torch.ones(48)
    y = native_int8.native_int8_linear(x, *native_int8.pack(weight, ones, None), 48, False)
    assert torch.equal(y, int8_linear_reference(x, weight, ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("outputs", "columns", "group"), [(96, 256, 32), (50, 384, 64), (17, 128, 128)])
def test_int4_is_what_the_operators_say_but_for_the_rounding_of_rows(outputs, columns, group, symmetric, bits, dtype):
    torch.manual_seed(0)
    qweight, scale, zero = int4.quantize_weight(torch.randn(outputs, columns).to(dtype), group, symmetric, bits=bits)
    weight, bias = int4.dequantize(qweight, scale, zero, group, bits), torch.randn(outputs)
    packed = packed_int4(qweight, scale, zero, bits)
    for rows in ROWS:
        x = torch.randn(rows, columns).to(dtype)
        y = native_int4.native_int4_linear(x, *packed, bias, outputs, group)
        assert y.dtype == dtype
        assert distance(y, torch.nn.functional.linear(x.float(), weight, bias)) < 0.013, rows
        # A row that is 127 at most, and whole, is not rounded at all.
        x = torch.randint(-127, 128, (rows, columns)).float().index_fill_(1, torch.arange(0, columns, 32), 127).to(dtype)
        y = native_int4.native_int4_linear(x, *packed, bias, outputs, group)
        assert distance(y, torch.nn.functional.linear(x.float(), weight, bias)) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_a_weight_that_is_packed_in_parts_is_the_same(monkeypatch):
    qweight, scale, zero = int4.quantize_weight(torch.randn(100, 64), 32, False)
    whole = packed_int4(qweight, scale, zero)
    monkeypatch.setattr(native_int4, "AT_ONCE", 48)
    assert all(torch.equal(a, b) for a, b in zip(whole, packed_int4(qweight, scale, zero), strict=True))


def test_what_rounding_the_rows_costs_stays_below_what_the_format_does():
    """Also where one number of each run is all there is to see: see the docstring of native_int4."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    qweight, scale, _ = int4.quantize_weight(weight, 128, True)
    rounded, packed = int4.dequantize(qweight, scale, None, 128), packed_int4(qweight, scale)
    x = torch.randn(40, 512)
    x[:, ::64] *= torch.logspace(0, 4, 40)[:, None]
    y = native_int4.native_int4_linear(x, *packed, None, 256, 128).double()
    exact = x.double() @ weight.double().T
    whole, format_alone = ((each - exact).norm(dim=1) for each in (y, x.double() @ rounded.double().T))
    assert (whole / format_alone).max() < 1.05 and (whole / format_alone).log().mean().exp() < 1.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(level, value):
    x = torch.randn(7, 64)
    x[2, 5] = value
    qweight, scale, _ = int4.quantize_weight(torch.randn(32, 64), 32, True)
    made = [native_int4.native_int4_linear(x, *packed_int4(qweight, scale), None, 32, 32)]
    int8 = native_int8.pack(torch.randint(-127, 128, (32, 64), dtype=torch.int8), torch.ones(32), None)
    for each in (x, x.bfloat16()):
        made += [native_int8.native_int8_linear(each, *int8, 32, split) for split in (False, True)]
    for y in made:
        assert not y[2].isfinite().any() and y[torch.arange(7) != 2].isfinite().all()


@pytest.mark.fault(9, 11)
def test_shapes_that_have_no_rows_and_tensors_that_are_not_contiguous(level):
    qweight, scale, _ = int4.quantize_weight(torch.randn(32, 64), 32, True)
    packed = packed_int4(qweight, scale)
    x = torch.randn(64, 6).t()
    same = native_int4.native_int4_linear(x.contiguous(), *packed, None, 32, 32)
    assert torch.equal(native_int4.native_int4_linear(x, *packed, None, 32, 32), same)
    assert native_int4.native_int4_linear(x[:0], *packed, None, 32, 32).shape == (0, 32)
    assert native_int4.native_int4_linear(x[None, :, :], *packed, None, 32, 32).shape == (1, 6, 32)


def test_threads_change_nothing(level):
    torch.manual_seed(0)
    packed = native_int8.pack(torch.randint(-127, 128, (70, 96), dtype=torch.int8), torch.rand(70), torch.randn(70))
    x = torch.randn(333, 96)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native_int8.native_int8_linear(x, *packed, 70, False))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(each, results[0]) for each in results)


def attention_inputs(kind, dtype, batch, heads, shared, queries, keys, width):
    q, k, v = (
        torch.randn(batch, length, count, width).to(dtype).transpose(1, 2)
        for count, length in ((heads, queries), (shared, keys), (shared, keys))
    )
    masks = {
        "bool": torch.rand(batch, 1, queries, keys) > 0.3,
        "padding": (torch.arange(keys) < keys - 3)[None, None, None].expand(batch, 1, queries, keys),
        "numbers": torch.randn(1, heads, queries, keys).to(dtype).masked_fill(torch.rand(queries, keys) > 0.8, -torch.inf),
        "every other": (torch.rand(batch, 1, queries, 2 * keys) > 0.3)[..., ::2],
    }
    return q, k, v, masks.get(kind)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "padding", "numbers", "every other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",  # batch, heads, heads of keys, queries, keys, width
    [(1, 1, 1, 1, 9, 16), (2, 6, 2, 1, 90, 64), (2, 6, 2, 5, 91, 80), (1, 1, 1, 8, 8, 16), (2, 12, 12, 37, 37, 32),
     (2, 6, 2, 50, 90, 64), (1, 4, 4, 129, 129, 80), (2, 4, 1, 17, 300, 128)],
)  # fmt: skip
def test_attention_is_what_torch_computes(sizes, dtype, kind):
    torch.manual_seed(0)
    q, k, v, mask = attention_inputs(kind, dtype, *sizes)
    options = {"is_causal": kind == "causal", "enable_gqa": q.shape[1] != k.shape[1], "scale": 0.3 if kind == "bool" else None}
    wide = mask.double() if kind == "numbers" else mask
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), wide, **options)
    y = native_attention.native_attention(q, k, v, mask, **options)
    assert native_attention._pays(q, k, v) and y.dtype == dtype and y.shape == exact.shape
    assert distance(y, exact) < (2e-6 if dtype == torch.float32 else 5e-3)


def test_queries_that_see_nothing_and_numbers_that_are_none():
    q, k, v, _ = attention_inputs("none", torch.float32, 1, 2, 2, 16, 16, 16)
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[3] = False
    for each in (mask, torch.where(mask, 0.0, -torch.inf)):
        y = native_attention.native_attention(q, k, v, each)
        assert not y[:, :, 3].any() and torch.allclose(y, scaled_dot_product_attention(q, k, v, each), atol=1e-5)
    q[0, 0, 5, 0] = torch.nan
    y = native_attention.native_attention(q, k, v)
    assert y[0, 0, 5].isnan().all() and y[0, 1].isfinite().all() and y[0, 0, 6:].isfinite().all()


def test_attention_that_does_not_pay_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(native_attention, "_functions", lambda level: pytest.fail("computed"))
    for sizes in ((1, 1, 1, 16, 20_000, 16), (0, 2, 2, 16, 16, 16), (1, 2, 2, 16, 0, 16)):
        q, k, v, _ = attention_inputs("none", torch.float32, *sizes)
        expected = scaled_dot_product_attention(q, k, v)
        assert torch.equal(native_attention.native_attention(q, k, v), expected)
