"""The int8 linear ops and the weight scheme under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.errors import InputRefused
from fxc.schemes.int8 import dequantize, quantize_weight
from fxc_kernels.int8_linear import (
    INT32_COLUMNS,
    int8_linear_reference,
    int8_weight_only_linear_reference,
    quantize_rows,
)

OPS = {
    "int8_linear": int8_linear_reference,
    "int8_weight_only_linear": int8_weight_only_linear_reference,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(lead, rows, columns, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, columns, generator=generator).to(dtype)
    qweight = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator) * 0.01
    return x, qweight, scale, torch.randn(rows, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_cpu_kernel_follows_the_reference(name, dtype, lead, bias):
    args = make(lead, 7, 13, dtype, bias)
    out = getattr(torch.ops.fxc, name)(*args)
    assert out.shape == (*lead, 7) and out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, OPS[name](*args), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.fxc, name).default, make((2, 3), 5, 11, dtype))
    torch.library.opcheck(getattr(torch.ops.fxc, name).default, make((4,), 8, 16, dtype, bias=False))


def naive(x, qweight, scale, bias):
    """The formula of fxc_kernels.int8_linear in float64 and Python integers, one number at a time."""
    rows = []
    for row in x.double().tolist():
        lo, hi = min(*row, 0.0), max(*row, 0.0)
        s = (hi - lo) / 255 or 1.0
        z = round(-128 - lo / s)
        q = [min(max(round(v / s) + z, -128), 127) for v in row]
        rows.append(
            [
                s * c * (sum(a * b for a, b in zip(q, w)) - z * sum(w)) + b
                for w, c, b in zip(qweight.tolist(), scale.tolist(), bias.tolist())
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def assert_follows_the_formula(implementation, x, qweight, scale, bias):
    """Within float32 rounding, or one step where x / s lies so near a half that float32 and float64 round apart."""
    expected = naive(x, qweight, scale, bias)
    out = implementation(x, qweight, scale, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


ROWS = {
    "both sides": lambda x: x,
    "above": lambda x: x.abs() + 0.1,
    "below": lambda x: -x.abs() - 0.1,
    "one outlier": lambda x: torch.where(torch.arange(x.shape[1]) == 3, 40.0, x),
    "gelu": lambda x: torch.nn.functional.gelu(4 * x),
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("implementation", [int8_linear_reference, torch.ops.fxc.int8_linear], ids=["reference", "op"])
def test_int8_linear_is_its_formula(implementation, rows, seed):
    x, qweight, scale, bias = make((4,), 7, 33, seed=seed)
    qweight += (qweight < 0) * 60  # column sums far from 0
    assert_follows_the_formula(implementation, ROWS[rows](x), qweight, scale, bias)


@pytest.mark.parametrize("fault", ["no correction", "zero point off by one", "symmetric", "column sum of |w|"])
def test_the_formula_tells_a_wrong_implementation_apart(fault):
    def wrong(x, qweight, scale, bias):
        q, s, z = quantize_rows(x)
        column_sum = qweight.long().sum(1)
        if fault == "no correction":
            z = 0 * z
        elif fault == "zero point off by one":
            z = z + 1
        elif fault == "column sum of |w|":
            column_sum = qweight.long().abs().sum(1)
        else:
            s = x.abs().amax(1, keepdim=True) / 127
            q, z = (x / s).round(), 0 * z
        return (q.long() @ qweight.long().t() - z * column_sum) * s * scale + bias

    args = make((4,), 7, 33)
    with pytest.raises(AssertionError):
        assert_follows_the_formula(wrong, ROWS["gelu"](args[0]), *args[1:])


def test_rows_with_one_sided_outliers_keep_their_steps():
    x = ROWS["gelu"](torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    q, scale, zero_point = quantize_rows(x)
    symmetric = x.abs().amax(1, keepdim=True) / 127
    error = (x - scale * (q.int() - zero_point)).norm()
    assert error < 0.6 * (x - symmetric * (x / symmetric).round()).norm()


@pytest.mark.parametrize("columns", [2**12 + 1, INT32_COLUMNS, INT32_COLUMNS + 1])
def test_the_integers_are_exact_where_float32_is_not(columns):
    x = torch.full((1, columns), 255.0)
    qweight = torch.full((1, columns), 127, dtype=torch.int8)
    scale = torch.ones(1)
    x[0, 0], qweight[0, 0] = 1.0, 1
    exact = 255 * 127 * (columns - 1) + 1
    assert exact > 2**24 and int(torch.tensor(float(exact), dtype=torch.float32)) != exact + 1
    q, row_scale, zero_point = quantize_rows(x)
    assert row_scale.item() == 1.0 and zero_point.item() == -128
    assert int(((q.long() - zero_point) @ qweight.long().t()).item()) == exact
    expected = torch.tensor([[float(exact)]], dtype=torch.float32)
    assert torch.equal(int8_linear_reference(x, qweight, scale), expected)
    assert torch.equal(torch.ops.fxc.int8_linear(x, qweight, scale, None), expected)


@pytest.mark.fault(7)
@pytest.mark.parametrize("name", OPS)
def test_rows_of_zeros_give_the_bias(name):
    x, qweight, scale, bias = make((3,), 4, 6)
    x[1] = 0
    out = getattr(torch.ops.fxc, name)(x, qweight, scale, bias)
    assert torch.equal(out[1], bias) and torch.isfinite(out).all()


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("columns", [0, 1])
def test_few_columns(name, columns):
    x, qweight, scale, bias = make((2, 3), 4, columns)
    out = getattr(torch.ops.fxc, name)(x, qweight, scale, bias)
    torch.testing.assert_close(out, OPS[name](x, qweight, scale, bias))
    if columns == 0:
        assert torch.equal(out, bias.expand(2, 3, 4))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_activations_do_not_come_out_finite(name, bad):
    x, qweight, scale, bias = make((3,), 4, 6)
    x[1, 2] = bad
    out = getattr(torch.ops.fxc, name)(x, qweight, scale, bias)
    assert not torch.isfinite(out[1]).any() and torch.isfinite(out[[0, 2]]).all()


def test_wrong_operands_are_refused():
    x, qweight, scale, bias = make((3,), 4, 6)
    op = torch.ops.fxc.int8_linear
    with pytest.raises(TypeError):
        op(x.long(), qweight, scale, bias)
    with pytest.raises(TypeError):
        op(x, qweight.float(), scale, bias)
    with pytest.raises(ValueError):
        op(x[:, :5], qweight, scale, bias)
    with pytest.raises(ValueError):
        op(x, qweight, scale[:3], bias)
    with pytest.raises(ValueError):
        op(x, qweight, scale, bias[:3])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(-37, 37), st.integers(0, 2**16))
def test_quantized_rows_are_within_half_a_step(rows, columns, exponent, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    q, scale, zero_point = quantize_rows(x)
    assert (q.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert scale.shape == zero_point.shape == (rows, 1) and (zero_point.abs() <= 128).all()
    steps = q.int() - zero_point
    error = (x.double() - steps * scale.double()).abs()
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    normal = span > 1e-30
    assert (error <= scale.double() * 0.5001)[normal].all()
    used = steps.amax(1).clamp(min=0) - steps.amin(1).clamp(max=0)
    assert (used >= 254)[normal].all()
    assert (scale[~normal] == 1).all() and (steps[~normal] == 0).all()
    assert quantize_rows(torch.zeros_like(x))[0].eq(-128).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_quantized_weights_are_within_half_a_step(rows, columns, dtype, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[seed % rows] *= seed % 3  # also rows of zeros
    qweight, scale = quantize_weight(weight)
    assert qweight.dtype == torch.int8 and scale.dtype == torch.float32
    assert qweight.shape == weight.shape and scale.shape == (rows,) and (scale > 0).all()
    restored = dequantize(qweight, scale)
    assert ((restored - weight.float()).abs() <= scale[:, None] * 0.50001).all()
    # What was rounded once stays: the scheme is idempotent on its own results.
    again, scale_again = quantize_weight(restored)
    assert torch.equal(again, qweight)
    zero = weight.abs().amax(1) == 0
    assert (scale[zero] == 1).all() and (qweight[zero] == 0).all()
    torch.testing.assert_close(scale_again, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_weight_without_a_scale_is_refused(bad):
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[1, 2] = bad
    with pytest.raises(InputRefused, match="NaN or Inf"):
        quantize_weight(weight)


def test_a_weight_that_is_no_float_matrix_is_refused():
    with pytest.raises(InputRefused):
        quantize_weight(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(InputRefused):
        quantize_weight(torch.ones(3, 4, 5))


@pytest.mark.fault(9)
def test_empty_weights():
    for shape in [(0, 4), (3, 0)]:
        qweight, scale = quantize_weight(torch.empty(shape))
        assert qweight.shape == shape and qweight.dtype == torch.int8 and scale.shape == shape[:1]
