"""Every Triton kernel against its reference in Triton's interpreter: python tests/triton_interpreted.py NAME.

A script, because the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, and for the whole process.
Each check goes over odd shapes and dtypes, and then has to fail for a mutation of what the kernel was given.
"""

import itertools
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear
from fxc_kernels import triton_int4_linear as int4
from fxc_kernels import triton_norm_quantize as norm
from fxc_kernels import triton_quantize_rows as rows
from fxc_kernels import triton_scaled_mm as scaled
from fxc_kernels import triton_sparse24 as sparse
from fxc_kernels import triton_weight_only as weight_only
from fxc_kernels.triton_tile import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest number: float32 sums in another order; half a step of float16; a whole one of bfloat16, because the
# interpreter cuts float32 off where a chip rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FP8 = torch.float8_e4m3fn
# (rows, outputs, columns): one of everything, tails in every dimension, each of the row counts that have a kernel.
SHAPES = ((1, 1, 1), (2, 17, 33), (3, 9, 530), (7, 65, 129), (33, 20, 257), (70, 33, 65))
SPLIT = Config(None, 16, 32, 32, 4, 3, split=3)


def close(out, expected) -> bool:
    assert out.shape == expected.shape and out.dtype == expected.dtype, (out.shape, expected.shape, out.dtype, expected.dtype)
    error = (out.float() - expected.float()).abs().max().item()
    return error <= TOLERANCE[out.dtype] * expected.float().abs().max().item()


def tensors(shape, dtype, seed=0):
    """x, a bias and a generator. x leans to one side, so that its zero points are not near 0."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape[0], shape[2], generator=generator) + 0.4).to(dtype)
    return x, torch.randn(shape[1], generator=generator).to(dtype), generator


def scales(count, generator):
    return torch.rand(count, generator=generator) * 0.02 + 0.001


def int8_weight(shape, generator):
    return torch.randint(-127, 128, (shape[1], shape[2]), generator=generator, dtype=torch.int8), scales(shape[1], generator)


def fp8_weight(shape, generator):
    return (50 * torch.randn(shape[1], shape[2], generator=generator)).to(FP8), scales(shape[1], generator)


def interpreter_rounded(q, exact, values):
    """Where the interpreter's conversion of `values` to e4m3 is at fault: what rounds up to a power of two becomes half of it,
    halves go up, and below the normal numbers it may be a step off."""
    q, exact = q.float(), exact.float()
    carry = (torch.frexp(exact)[0].abs() == 0.5) & (2 * q == exact)
    half = (values - q).abs() == (values - exact).abs()
    tiny = (exact.abs() < 2**-6) & ((q - exact).abs() <= 2**-9)
    return carry | half | tiny


def check_quantize_rows():
    for columns, dtype in itertools.product((1, 3, 128, 1000), DTYPES):
        x = tensors((5, 1, columns), dtype)[0] * 3
        x[1] = 0
        expected = int8_linear.quantize_rows(x)
        for kept in (rows.KEPT, 64):  # rows that stay in registers, and rows that are read twice
            rows.row_block.__defaults__ = (kept,)
            q, scale, zero = rows.quantize_rows(x)
            assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1][:, 0]), (columns, dtype)
            assert torch.equal(zero, expected[2][:, 0]), (columns, dtype)
            assert not torch.equal(rows.quantize_rows(x * 1.01)[1], scale), "the mutation was not seen"
            q, scale, none = rows.quantize_rows(x, FP8)
            exact, exact_scale = fp8_linear.quantize_rows(x)
            assert none is None and torch.equal(scale, exact_scale[:, 0])
            values = x.float() * exact_scale.reciprocal()
            assert ((q.float() == exact.float()) | interpreter_rounded(q, exact, values)).all(), (columns, dtype)
    x = torch.randn(3, 9)
    x[0, 2], x[1, 3] = float("nan"), float("inf")
    for dtype in (torch.int8, FP8):
        assert torch.isfinite(rows.quantize_rows(x, dtype)[1]).tolist() == [False, False, True]
    assert rows.quantize_rows(torch.empty(0, 9))[0].shape == (0, 9)


def check_int8_linear():
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x, bias, generator = tensors(shape, dtype)
        weight, scale = int8_weight(shape, generator)
        for given in (bias, None):
            expected = int8_linear.int8_linear_reference(x, weight, scale, given)
            assert close(scaled.int8_linear(x, weight, scale, given), expected), (shape, dtype)
        expected = int8_linear.int8_linear_reference(x, weight, scale, bias)
        assert close(scaled.int8_linear(x, weight, scale, bias, config=SPLIT), expected), (shape, dtype, "split")
        wrong = weight.sum(dim=1, dtype=torch.int32) * 0
        assert not close(scaled.int8_linear(x, weight, scale, bias, column_sum=wrong), expected), "the mutation was not seen"
    assert scaled.int8_linear(torch.empty(2, 0, 5), torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)).shape == (2, 0, 3)


def check_activations():
    shape, functional = (5, 17, 40), torch.nn.functional
    meant = {"gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "silu": functional.silu}
    x, bias, generator = tensors(shape, torch.float32)
    weight, scale = int8_weight(shape, generator)
    expected = int8_linear.int8_linear_reference(x, weight, scale, bias)
    many = x.repeat(14, 1)
    for name, function in meant.items():
        assert close(scaled.int8_linear(x, weight, scale, bias, activation=name), function(expected)), name
        assert close(scaled.int8_linear(many, weight, scale, bias, activation=name), function(expected.repeat(14, 1))), name
        out = weight_only.weight_only_linear(many, weight, scale, bias, activation=name)
        exact = int8_linear.int8_weight_only_linear_reference(many, weight, scale, bias)
        assert close(out, function(exact)) and not close(out, exact), name


def check_scaled_mm_fp8():
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x, bias, generator = tensors(shape, dtype)
        weight, scale = fp8_weight(shape, generator)
        q, row_scale = fp8_linear.quantize_rows(x)
        expected = scaled.scaled_mm_reference(q, row_scale[:, 0], None, weight, scale, bias).to(dtype)
        assert close(expected, fp8_linear.fp8_linear_reference(x, weight, scale, bias))
        for config in (None, SPLIT):
            out = scaled.scaled_mm(q, row_scale[:, 0], None, weight, scale, bias, dtype=dtype, config=config)
            assert close(out, expected), (shape, dtype)
        wrong = scaled.scaled_mm(q, row_scale[:, 0], None, weight, scale * 1.5, bias, dtype=dtype)
        assert not close(wrong, expected), "the mutation was not seen"
    # With the interpreter's own rounding of x, where it has no carry to lose.
    x, bias, generator = tensors((3, 5, 40), torch.float32)
    x = fp8_linear.quantize_rows(x)[0].float()
    weight, scale = fp8_weight((3, 5, 40), generator)
    assert close(scaled.fp8_linear(x, weight, scale, bias), fp8_linear.fp8_linear_reference(x, weight, scale, bias))


def check_weight_only():
    references = (int8_linear.int8_weight_only_linear_reference, fp8_linear.fp8_weight_only_linear_reference)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x, bias, generator = tensors(shape, dtype)
        for make, reference in zip((int8_weight, fp8_weight), references):
            weight, scale = make(shape, generator)
            expected = reference(x, weight, scale, bias)
            for config in (None, SPLIT):
                assert close(weight_only.weight_only_linear(x, weight, scale, bias, config=config), expected), (shape, dtype)
            wrong = weight_only.weight_only_linear(x, weight, scale * 1.5, bias)
            assert not close(wrong, expected), "the mutation was not seen"
            weight_only.load_ahead, before = (lambda capability: True), weight_only.load_ahead
            assert close(weight_only.weight_only_linear(x, weight, scale, bias), expected), (shape, dtype, "ahead")
            weight_only.load_ahead = before


def check_int4():
    shapes = ((1, 1, 1), (2, 17, 5), (3, 9, 9), (7, 65, 3), (33, 20, 4), (70, 33, 2))
    for (count, outputs, groups), dtype, group in itertools.product(shapes, DTYPES, int4.GROUPS):
        shape = (count, outputs, groups * group)
        x, bias, generator = tensors(shape, dtype)
        weight = torch.randint(0, 256, (outputs, shape[2] // 2), generator=generator, dtype=torch.uint8)
        scale = scales(outputs * groups, generator).reshape(outputs, groups)
        zero = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
        packed = int4.prepack(weight, group)
        for given in (None, zero):
            expected = int4_linear.int4_weight_only_linear_reference(x, weight, scale, given, bias, group)
            for ahead, config in ((False, None), (True, Config(None, 16, 32, group, 4, 3, split=2))):
                int4.load_ahead = lambda capability, ahead=ahead: ahead
                out = int4.int4_weight_only_linear(x, packed, scale, given, bias, group, config=config)
                assert close(out, expected), (shape, dtype, group, config)
        wrong = int4.int4_weight_only_linear(x, packed, scale, zero ^ 1, bias, group)
        assert not close(wrong, expected), "the mutation was not seen"


def check_norm_quantize():
    for columns, dtype in itertools.product((1, 33, 300), DTYPES):
        x, weight, generator = tensors((3, columns, columns), dtype)
        residual = torch.randn(3, columns, generator=generator).to(dtype)
        # In steps of the quantized row. The interpreter cuts bfloat16 off three times on the way, by up to two steps each.
        allowed = 6 if dtype == torch.bfloat16 else 1
        for given in (None, residual):
            q, scale, zero, total = norm.rms_norm_quantize(x, weight, 1e-5, given)
            normed, exact_total = norm.rms_norm_reference(x, weight, 1e-5, given)
            assert close(total, exact_total), (columns, dtype)
            assert steps(q, scale, zero, normed) <= allowed, (columns, dtype)
            wrong = norm.rms_norm_quantize(x, weight * 1.1, 1e-5, given)
            assert steps(*wrong[:3], normed) > allowed, "the mutation was not seen"
            q, scale, none, _ = norm.rms_norm_quantize(x, weight, 1e-5, given, FP8)
            exact, exact_scale = fp8_linear.quantize_rows(normed)
            same = (q.float() == exact.float()) | interpreter_rounded(q, exact, normed.float() * exact_scale.reciprocal())
            assert none is None and (dtype == torch.bfloat16 or same.float().mean() > 0.99), (columns, dtype)
        merged = torch.randn(3, 2 * columns, generator=generator).to(dtype)
        assert steps(*norm.silu_mul_quantize(merged), norm.silu_mul_reference(merged)) <= allowed, (columns, dtype)
        wrong = norm.silu_mul_quantize(merged * 1.2)
        assert steps(*wrong, norm.silu_mul_reference(merged)) > allowed, "the mutation was not seen"


def steps(q, scale, zero, rounded_from) -> float:
    """How far the quantized rows are from the float rows, in steps of the reference's scale, half a step being rounding."""
    exact, exact_scale, exact_zero = int8_linear.quantize_rows(rounded_from)
    apart = (q.float() - zero[:, None]) * scale[:, None] - (exact.float() - exact_zero) * exact_scale
    return (apart.abs() / exact_scale).max().item()


def check_sparse24():
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    for shape, dtype in itertools.product(((1, 1, 8), (3, 17, 40), (20, 33, 264), (64, 9, 136), (70, 33, 72)), DTYPES):
        x, bias, generator = tensors(shape, dtype)
        _, outputs, columns = shape
        chosen = torch.randint(0, 6, (outputs, columns // 4), generator=generator)
        meta = (pairs[chosen].reshape(outputs, -1, 4) * torch.tensor([1, 4, 16, 64])).sum(-1).to(torch.uint8)
        values = torch.randn(outputs, columns // 2, generator=generator).to(dtype)
        weight, scale = int8_weight((1, outputs, columns // 2), generator)
        assert torch.equal(sparse.dense(weight, meta), sparse24_linear.unpack(weight, meta))
        expected = sparse24_linear.sparse24_linear_reference(x, values, meta, bias)
        exact = sparse24_linear.int8_sparse24_linear_reference(x, weight, meta, scale, bias)
        for config in (None, SPLIT):
            assert close(sparse.sparse24_linear(x, values, meta, bias, config=config), expected), (shape, dtype)
            assert close(sparse.int8_sparse24_linear(x, weight, meta, scale, bias, config=config), exact), (shape, dtype)
        # Every position moved by one bit: pairs that stay pairs, at other places.
        wrong = ((pairs[(chosen + 1) % 6]).reshape(outputs, -1, 4) * torch.tensor([1, 4, 16, 64])).sum(-1).to(torch.uint8)
        assert not close(sparse.sparse24_linear(x, values, wrong, bias), expected), "the mutation was not seen"
        assert not close(sparse.int8_sparse24_linear(x, weight, wrong, scale, bias), exact), "the mutation was not seen"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    # NumPy warns of the NaN and Inf that some rows hold on purpose.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    CHECKS[sys.argv[1]]()
