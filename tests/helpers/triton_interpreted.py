"""Every Triton kernel against its reference in Triton's interpreter: python tests/helpers/triton_interpreted.py NAME... [every]

A script, because the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, and for the whole process.
Each check goes over odd shapes and dtypes, and then has to fail for a mutation of what the kernel was given. With `every` each
shape is tried in every dtype, without it in one, the next in another.
"""

import contextlib
import functools
import itertools
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch

from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear
from fxc_kernels.cuda import int4_linear as int4
from fxc_kernels.cuda import interleaved, rms_norm, rope, weight_only
from fxc_kernels.cuda import norm_quantize as norm
from fxc_kernels.cuda import persistent_mm as persistent
from fxc_kernels.cuda import quantize_rows as rows
from fxc_kernels.cuda import scaled_mm as scaled
from fxc_kernels.cuda import sparse24 as sparse
from fxc_kernels.cuda.tile import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest number: float32 sums in another order; half a step of float16; a whole one of bfloat16, because the
# interpreter cuts float32 off where a chip rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FP8 = torch.float8_e4m3fn
# (rows, outputs, columns): one of everything, tails in every dimension, each of the row counts that have a kernel.
SHAPES = ((1, 1, 1), (2, 17, 33), (3, 9, 530), (7, 65, 129), (33, 20, 257), (70, 33, 65))
SPLIT = Config(None, 16, 32, 32, 4, 3, split=3)


def cases(shapes, *others):
    if "every" in sys.argv:
        return list(itertools.product(shapes, *others))
    return list(zip(shapes, *map(itertools.cycle, others)))


def close(out, expected, steps=1) -> bool:
    assert out.shape == expected.shape and out.dtype == expected.dtype, (out.shape, expected.shape, out.dtype, expected.dtype)
    error = (out.float() - expected.float()).abs().max().item()
    return error <= steps * TOLERANCE[out.dtype] * expected.float().abs().max().item()


@contextlib.contextmanager
def refused(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"was not refused with {text!r}")


@contextlib.contextmanager
def seen(module, name):
    """The arguments of each call of the function `name` of `module`."""
    calls, function = [], getattr(module, name)
    setattr(module, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    yield calls
    setattr(module, name, function)


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
    half = ((values - q).abs() - (values - exact).abs()).abs() <= 1e-5 * values.abs()
    tiny = (exact.abs() < 2**-6) & ((q - exact).abs() <= 2**-9)
    return carry | half | tiny


def check_quantize_rows():
    for columns, dtype in cases((1, 3, 128, 1000), DTYPES):
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
    for shape, dtype in cases(SHAPES, DTYPES):
        x, bias, generator = tensors(shape, dtype)
        weight, scale = int8_weight(shape, generator)
        for given in (bias, None):
            expected = int8_linear.int8_linear_reference(x, weight, scale, given)
            assert close(scaled.int8_linear(x, weight, scale, given), expected), (shape, dtype)
            assert close(int8_linear._int8_linear_cuda(x, weight, scale, given), expected), (shape, dtype)
        expected = int8_linear.int8_linear_reference(x, weight, scale, bias)
        assert close(scaled.int8_linear(x, weight, scale, bias, config=SPLIT), expected), (shape, dtype, "split")
        wrong = weight.sum(dim=1, dtype=torch.int32) * 0
        assert not close(scaled.int8_linear(x, weight, scale, bias, column_sum=wrong), expected), "the mutation was not seen"
    assert scaled.int8_linear(torch.empty(2, 0, 5), torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)).shape == (2, 0, 3)
    x, empty = torch.randn(2, 0), torch.zeros(3, 0, dtype=torch.int8)
    for given, weight in ((x, empty), (torch.empty(0, 5), torch.ones(3, 5, dtype=torch.int8)), (x[:, :0], empty)):
        exact = int8_linear.int8_linear_reference(given, weight, torch.ones(3))
        assert torch.equal(int8_linear._int8_linear_cuda(given, weight, torch.ones(3), None), exact)


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


def check_silu_mul():
    """Weights of gate and up interleaved, against the two products of the weights apart."""
    shapes = ((1, 1, 1), (2, 9, 33), (3, 33, 257), (33, 10, 64), (70, 17, 65), (65, 3, 16))
    for (count, half, columns), dtype in zip(shapes, 2 * DTYPES):
        x, _, generator = tensors((count, half, columns), dtype)
        biases = [torch.randn(half, generator=generator).to(dtype) for _ in range(2)]
        bias = interleaved.interleave(*biases)
        for make, linear, reference in (
            (int8_weight, scaled.int8_linear, int8_linear.int8_linear_reference),
            (int8_weight, weight_only.weight_only_linear, int8_linear.int8_weight_only_linear_reference),
            (fp8_weight, weight_only.weight_only_linear, fp8_linear.fp8_weight_only_linear_reference),
        ):
            pair = [make((count, half, columns), generator) for _ in range(2)]
            gate, up = (reference(x.float(), *each, b.float()) for each, b in zip(pair, biases))
            weight, scale = (interleaved.interleave(*both) for both in zip(*pair))
            expected = interleaved.silu_mul(torch.stack([gate, up], dim=-1).flatten(-2)).to(dtype)
            for config in (None, SPLIT):
                out = linear(x, weight, scale, bias, activation="silu_mul", config=config)
                assert close(out, expected, steps=2), (count, half, columns, dtype, linear, config)
            wrong = interleaved.interleave(pair[1][0], pair[0][0])
            swapped = linear(x, wrong, scale, bias, activation="silu_mul")
            assert not close(swapped, expected, steps=2), "the mutation was not seen"
        group = 32
        weights = [torch.randint(0, 256, (half, 2 * group), generator=generator, dtype=torch.uint8) for _ in range(2)]
        steps = [scales(half * 4, generator).reshape(half, 4) for _ in range(2)]
        tokens = torch.randn(count, 4 * group, generator=generator).to(dtype)
        parts = zip(weights, steps, biases)
        reference = int4_linear.int4_weight_only_linear_reference
        gate, up = (reference(tokens.float(), w, s, None, b.float(), group) for w, s, b in parts)
        expected = (torch.nn.functional.silu(gate) * up).to(dtype)
        packed, scale = int4.prepack(interleaved.interleave(*weights), group), interleaved.interleave(*steps)
        for config in (None, Config(None, 16, 32, group, 4, 3, split=2)):
            out = int4.int4_weight_only_linear(tokens, packed, scale, None, bias, group, activation="silu_mul", config=config)
            assert close(out, expected, steps=2), (count, half, dtype, config)
    q, scale = torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)
    for linear in (scaled.int8_linear, weight_only.weight_only_linear):
        assert linear(torch.empty(0, 5), torch.zeros(4, 5, dtype=torch.int8), torch.ones(4), activation="silu_mul").shape == (
            0,
            2,
        )
        for count in (2, 70):
            with refused(ValueError, "no pairs"):
                linear(torch.zeros(count, 5), q, scale, activation="silu_mul")


def check_scaled_mm_fp8():
    for shape, dtype in cases(SHAPES, DTYPES):
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


def check_persistent_mm():
    """Rows and outputs that are whole tiles and not, fewer tiles than programs and more; K is a multiple of 16 for the TMA."""
    config = Config(None, 32, 64, 32, 4, 3, tma=True)
    for shape, dtype in cases(((1, 1, 16), (5, 34, 48), (64, 128, 32), (70, 130, 96)), DTYPES[1:]):
        x, bias, generator = tensors(shape, dtype)
        for make, quantized in ((int8_weight, int8_linear.quantize_rows(x)), (fp8_weight, fp8_linear.quantize_rows(x))):
            weight, scale = make(shape, generator)
            q, row_scale, *zero = (each.squeeze(1) if each.shape[1] == 1 < shape[2] else each for each in quantized)
            zero = zero[0] if zero else None
            exact = scaled.scaled_mm_reference(q, row_scale, zero, weight, scale, bias)
            run = functools.partial(scaled.scaled_mm, q, row_scale, zero, weight, dtype=dtype, config=config)
            with seen(scaled, "persistent_mm") as calls:
                assert close(run(scale, bias), exact.to(dtype)) and calls, (shape, dtype, make)
            assert close(run(scale), (exact - bias.float()).to(dtype), steps=2), (shape, dtype, make)
            assert not close(run(scale * 1.5, bias), exact.to(dtype)), "the mutation was not seen"
            if shape[1] % 2 == 0:
                out = run(scale, bias, activation="silu_mul")
                assert close(out, interleaved.silu_mul(exact).to(dtype), steps=2), (shape, dtype, make)
    # What does not fit, the kernel with pointers multiplies: float32, rows that are not whole 16 bytes, an address in between.
    x, bias, generator = tensors((70, 33, 33), torch.float32)
    weight, scale = int8_weight((70, 33, 33), generator)
    expected = int8_linear.int8_linear_reference(x, weight, scale, bias)
    assert close(scaled.int8_linear(x, weight, scale, bias, config=config), expected)
    x, weight = x[:, :32], torch.cat([torch.zeros(1, dtype=torch.int8), weight[:, :32].flatten()])[1:].view(33, 32)
    assert weight.data_ptr() % 16 and not persistent.fits(torch.zeros(70, 32, dtype=torch.int8), weight, bias.bfloat16())
    assert close(
        scaled.int8_linear(x, weight, scale, bias, config=config), int8_linear.int8_linear_reference(x, weight, scale, bias)
    )


def check_weight_only():
    references = (int8_linear.int8_weight_only_linear_reference, fp8_linear.fp8_weight_only_linear_reference)
    for shape, dtype in cases(SHAPES, DTYPES):
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
    for (count, outputs, groups), dtype, group in cases(shapes, DTYPES, int4.GROUPS):
        shape = (count, outputs, groups * group)
        x, bias, generator = tensors(shape, dtype)
        weight = torch.randint(0, 256, (outputs, shape[2] // 2), generator=generator, dtype=torch.uint8)
        scale = scales(outputs * groups, generator).reshape(outputs, groups)
        scale[::2] *= -1
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


def check_arguments():
    """No rows, rows that lie apart in memory, and what a kernel would read past the end of."""
    x, bias, generator = tensors((6, 16, 128), torch.float32)
    weight, scale = int8_weight((6, 16, 128), generator)
    q4 = torch.randint(0, 256, (16, 64), generator=generator, dtype=torch.uint8)
    s4 = scales(64, generator).reshape(16, 4)
    linears = {
        "int8": lambda x, bias: scaled.int8_linear(x, weight, scale, bias),
        "int8 weight-only": lambda x, bias: weight_only.weight_only_linear(x, weight, scale, bias),
        "int4": lambda x, bias: int4.int4_weight_only_linear(x, q4, s4, None, bias, 32),
    }
    apart = torch.stack([x, -x], dim=2)[:, :, 0]
    for name, linear in linears.items():
        assert linear(x[:0], bias).shape == (0, 16), name
        assert linear(x.reshape(2, 3, 128)[:, :0], bias).shape == (2, 0, 16), name
        assert not apart.is_contiguous() and torch.equal(linear(apart, bias), linear(x, bias)), name
        for wrong in (bias[:8], bias.repeat(2)[::2]):
            with refused(ValueError, "16 contiguous numbers"):
                linear(x, wrong)
        # What runs on another device than the current one is started there: the device of the first argument.
        with seen(torch.cuda, "device_of") as devices:
            linear(x, bias)
        assert devices, name
    wide = torch.cat([torch.zeros(128, 1), torch.ones(128, 1)], dim=1)
    q, *_ = rows.quantize_rows(wide.t()[1:])
    assert torch.equal(q, torch.full((1, 128), 127, dtype=torch.int8))
    for quantize in (norm.silu_mul_quantize, lambda x: norm.rms_norm_quantize(x, torch.ones(128), 1e-5)):
        assert quantize(x[:0])[0].shape[0] == 0
    with refused(ValueError, "the residual"):
        norm.rms_norm_quantize(x, torch.ones(128), 1e-5, x[:3])
    with refused(ValueError, "multiplies up to 2 rows"):
        weight_only.weight_only_linear(x, weight, scale, config=Config(None, 2, 8, 512, 4, 2))


def cut(x, dtype):
    """float32 x as the interpreter makes `dtype` of it: to bfloat16 it cuts where a chip rounds."""
    return (x.view(torch.int32) & -65536).view(torch.float32) if dtype == torch.bfloat16 else x.to(dtype).float()


def rounded(x, dtype):
    return x.to(dtype).float()


def norm_steps(x, weight, eps, residual, to):
    """`rms_norm_reference` in the kernel's order: a block of the next power of two is summed; to: `cut` or `rounded`."""
    total = x.float() if residual is None else to(x.float() + residual.float(), x.dtype)
    squares = torch.nn.functional.pad(total * total, (0, norm.row_block(x.shape[1])[0] - x.shape[1])).numpy()
    mean = torch.tensor([row.sum() for row in squares]) / x.shape[1]
    return to(to(total * (1 / (mean + eps).sqrt())[:, None], x.dtype) * weight.float(), x.dtype), total


def silu_steps(merged, to):
    gate, up = merged.float().chunk(2, dim=-1)
    sigmoid = torch.from_numpy(1 / (1 + numpy.exp(-gate.numpy())))
    return to(to(gate * sigmoid, merged.dtype) * up, merged.dtype)


def near(found, expected, dtype=torch.float32) -> bool:
    """Equal up to the last bits of `dtype`: NumPy chooses the order in which it sums float32 numbers by the CPU."""
    apart = 4 * torch.finfo(dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=apart, atol=apart * expected.float().abs().max().item() / 1e3)


def same_rows(made, values) -> bool:
    """Whether (q, scale, zero) are the quantized `values`, float32, as near as `near`: a number in the middle between two steps
    may go to either."""
    q, scale, zero = made
    if zero is not None:
        _, exact_scale, exact_zero = int8_linear.quantize_rows(values)
        steps = values / scale[:, None] + zero[:, None]
        rounded_right = ((steps - q.float()).abs() <= 0.5 + 1e-3) | (steps.clamp(-128, 127) == q)
        same_zero = (zero - exact_zero[:, 0]).abs().max() <= 1
        return bool(rounded_right.all()) and near(scale, exact_scale[:, 0]) and bool(same_zero)
    exact, exact_scale = fp8_linear.quantize_rows(values)
    same = (q.float() == exact.float()) | interpreter_rounded(q, exact, values * exact_scale.reciprocal())
    return same.all().item() and near(scale, exact_scale[:, 0])


def check_norm_quantize():
    """The steps of the references in the interpreter's rounding, which differs from a chip's for bfloat16; and those
    steps, rounded as a chip does, are the references."""
    for columns, dtype in cases((1, 33, 300), DTYPES):
        x, weight, generator = tensors((3, columns, columns), dtype)
        residual = torch.randn(3, columns, generator=generator).to(dtype)
        for given, to in itertools.product((None, residual), (torch.int8, FP8)):
            *made, total = norm.rms_norm_quantize(x, weight, 1e-5, given, to)
            normed, exact_total = norm_steps(x, weight, 1e-5, given, cut)
            assert same_rows(made, normed) and torch.equal(total.float(), exact_total), (columns, dtype, to)
            assert not same_rows(norm.rms_norm_quantize(x, weight * 1.1, 1e-5, given, to)[:3], normed), "no mutation seen"
            exact, exact_total = norm.rms_norm_reference(x, weight, 1e-5, given)
            normed, total = norm_steps(x, weight, 1e-5, given, rounded)
            assert close(normed.to(dtype), exact) and torch.equal(total, exact_total.float()), (columns, dtype)
        merged = torch.randn(3, 2 * columns, generator=generator).to(dtype)
        assert close(silu_steps(merged, rounded).to(dtype), norm.silu_mul_reference(merged)), (columns, dtype)
        for to in (torch.int8, FP8):
            activated = silu_steps(merged, cut)
            assert same_rows(norm.silu_mul_quantize(merged, to), activated), (columns, dtype, to)
            assert not same_rows(norm.silu_mul_quantize(merged * 1.2, to), activated), "the mutation was not seen"


def check_rms_norm():
    for columns, dtype in cases((1, 33, 300), DTYPES):
        x, weight, generator = tensors((3, columns, columns), dtype)
        residual = torch.randn(3, columns, generator=generator).to(dtype)
        for given in (None, residual):
            made, total = rms_norm.rms_norm(x, weight, 1e-5, given)
            normed, exact_total = norm_steps(x, weight, 1e-5, given, cut)
            assert near(made, normed, dtype) and torch.equal(total.float(), exact_total), (columns, dtype)
            assert not near(rms_norm.rms_norm(x, weight * 1.1, 1e-5, given)[0], normed, dtype), "no mutation seen"
    with refused(ValueError, "must have the shape of x"):
        rms_norm.rms_norm(x, weight, 1e-5, residual[:2])


def check_rope():
    for (batch, heads, tokens, width), dtype in cases(((1, 1, 1, 2), (2, 9, 3, 12), (1, 4, 5, 80)), DTYPES):
        generator = torch.Generator().manual_seed(0)
        # Views as a model has them: heads behind tokens, one table for all heads.
        x = torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)
        for tables in {1, batch}:
            angles = torch.randn(2, tables, tokens, width, generator=generator).to(dtype)
            cos, sin = angles[0].unsqueeze(1), angles[1].unsqueeze(1)
            expected = rope.rope_reference(x, cos, sin)
            assert close(rope.rope(x, cos, sin), expected, steps=2), (batch, heads, tokens, width, dtype)
            assert rope.rope(x, cos, sin).is_contiguous()
            assert not close(rope.rope(x, sin, cos), expected, steps=2), "the mutation was not seen"
    with refused(ValueError, "does not fit"):
        rope.rope(x, cos[:, :, :1], sin)


def check_sparse24():
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    for shape, dtype in cases(((1, 1, 8), (3, 17, 40), (20, 33, 264), (64, 9, 136), (70, 33, 72)), DTYPES):
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
    for name in sys.argv[1:]:
        if name != "every":
            CHECKS[name]()
