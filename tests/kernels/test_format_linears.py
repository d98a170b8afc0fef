"""The operators of int4, fp8 and 2:4 sparse layers compute their formulas."""

from __future__ import annotations

import pytest
import torch
from formats import DTYPES, normal
from torch import Tensor

from fxc.schemes import fp8, int4, int4_sparse24, int8_sparse24, sparse24
from fxc.schemes.int8 import quantize_weight
from fxc_kernels.fp8_linear import fp8_linear_reference, quantize_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def call_of(name: str, lead: tuple[int, ...], dtype: torch.dtype, bias: bool = True) -> tuple:
    """Arguments of the operator: N = 7, K = 64."""
    x, weight = normal(*lead, 64, seed=1, dtype=dtype), normal(7, 64, seed=2)
    b = normal(7, seed=3, dtype=dtype) if bias else None
    if name.startswith("int4 sparse24"):
        qweight, meta, scale, zero = int4_sparse24.quantize_weight(weight + 0.2, 32, "asymmetric" not in name)
        return x, qweight, meta, scale.to(dtype if bias else torch.float32), zero, b, 32
    if (bits := BITS.get(name[:4])) is not None:
        qweight, scale, zero = int4.quantize_weight(weight + 0.2, 32, "asymmetric" not in name, bits=bits)
        return x, qweight, scale.to(dtype if bias else torch.float32), zero, b, 32
    if name.startswith("fp8"):
        return x, *fp8.quantize_weight(weight), b
    values, meta = sparse24.pack(sparse24.mask_by_magnitude(weight.to(dtype)))
    if name == "sparse24":
        return x, values, meta, b
    qweight, scale = quantize_weight(values)
    return x, qweight, meta, scale, b


BITS = {"int4": 4, "int3": 3, "int2": 2}
OPS = {
    "int4": int4.LINEAR,
    "int4 asymmetric": int4.LINEAR,
    "int3": torch.ops.fxc.int3_weight_only_linear.default,
    "int3 asymmetric": torch.ops.fxc.int3_weight_only_linear.default,
    "int2": torch.ops.fxc.int2_weight_only_linear.default,
    "int2 asymmetric": torch.ops.fxc.int2_weight_only_linear.default,
    "fp8": fp8.LINEAR,
    "fp8 weight-only": fp8.WEIGHT_ONLY,
    "sparse24": sparse24.LINEAR,
    "int8 sparse24": int8_sparse24.LINEAR,
    "int4 sparse24": int4_sparse24.LINEAR,
    "int4 sparse24 asymmetric": int4_sparse24.LINEAR,
}


def naive(name: str, args: tuple) -> Tensor:
    """The formulas of the kernels' modules in float64, bit by bit."""
    bits = BITS.get(name[:4])
    if name.startswith("int4 sparse24"):
        x, qweight, meta, scale, zero, bias, group = args
        weight = torch.zeros(7, 64, dtype=torch.float64)
        for n in range(7):
            for i in range(32):
                at = 4 * (i // 2) + (int(meta[n, i // 4]) >> 2 * (i % 4) & 3)
                q = int(qweight[n, i // 2]) >> 4 * (i % 2) & 15
                weight[n, at] = scale[n, at // group].item() * (q - (8 if zero is None else int(zero[n, at // group])))
        out = x.double() @ weight.t()
        return out if bias is None else out + bias.double()
    x, bias = args[0].double(), args[4] if bits or name == "int8 sparse24" else args[3]
    if bits:
        _, qweight, scale, zero, _, group = args
        rows = []
        for n, row in enumerate(qweight.tolist()):
            stream = sum(byte << 8 * at for at, byte in enumerate(row))
            q = [stream >> bits * k & 2**bits - 1 for k in range(64)]
            z = [2 ** (bits - 1)] * len(scale[n]) if zero is None else zero[n].tolist()
            rows.append([scale[n, k // group].item() * (v - z[k // group]) for k, v in enumerate(q)])
        weight = torch.tensor(rows, dtype=torch.float64)
    elif name.startswith("fp8"):
        weight = args[1].double() * args[2].double()[:, None]
        if name == "fp8":
            q, scale = quantize_rows(args[0].reshape(-1, 64))
            x = (q.double() * scale.double()).reshape(x.shape)
    else:
        values, meta = args[1:3]
        weight = torch.zeros(values.shape[0], 64, dtype=torch.float64)
        for n, row in enumerate(values.double().tolist()):
            for i, value in enumerate(row):
                weight[n, 4 * (i // 2) + (int(meta[n, i // 4]) >> 2 * (i % 4) & 3)] = value
        if name == "int8 sparse24":
            return torch.ops.fxc.int8_linear(args[0], weight.to(torch.int8), args[3], bias).double()
    out = x @ weight.t()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_an_operator_is_its_formula(name, dtype, lead):
    for bias in (True, False):
        args = call_of(name, lead, dtype, bias)
        out = OPS[name](*args)
        assert out.shape == (*lead, 7) and out.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), naive(name, args), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("name", "position", "wrong"),
    [
        ("int4", 1, lambda q: q << 4 | q >> 4),
        ("int4 asymmetric", 3, lambda z: z + 1),
        ("int4", 2, lambda s: s.flip(1)),
        ("int3", 1, lambda q: q << 1 | q >> 7),
        ("int2", 1, lambda q: q << 2 | q >> 6),
        ("fp8", 2, lambda s: s.flip(0)),
        ("sparse24", 2, lambda m: m << 4 | m >> 4),
        ("int4 sparse24", 1, lambda q: q << 4 | q >> 4),
        ("int4 sparse24", 2, lambda m: m << 4 | m >> 4),
        ("int4 sparse24 asymmetric", 4, lambda z: z + 1),
        ("int8 sparse24", 2, lambda m: (m & 0x33) << 2 | (m & 0xCC) >> 2),
    ],
)
def test_the_formula_tells_a_wrong_layout_apart(name, position, wrong):
    args = call_of(name, (5,), torch.float32)
    spoiled = [wrong(a) if i == position else a for i, a in enumerate(args)]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OPS[name](*spoiled).double(), naive(name, args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    # torch's check that arguments are not written to compares them in a way that float8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks if name.startswith("fp8") else ("test_schema", *checks)
    torch.library.opcheck(OPS[name], call_of(name, (2, 3), torch.float32), test_utils=checks)
    torch.library.opcheck(OPS[name], call_of(name, (4,), torch.bfloat16, bias=False), test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_wrong_operands_are_refused(name):
    args = call_of(name, (5,), torch.float32)
    bias = len(args) - (2 if name[:4] in BITS else 1)

    def refused(kind, position, value):
        with pytest.raises(kind):
            OPS[name](*(value if i == position else a for i, a in enumerate(args)))

    refused(TypeError, 0, args[0].long())
    refused(TypeError, 1, args[1].double())
    refused(ValueError, 0, args[0][:, :56])
    refused(ValueError, bias, args[bias][:3])
    for position in range(2, bias):
        if args[position] is not None:
            refused(ValueError, position, args[position][:3])
            refused(TypeError, position, args[position].double())
    if name[:4] in BITS:
        refused(ValueError, len(args) - 1, 48)
        refused(ValueError, len(args) - 1, 128)


@pytest.mark.fault(7)
def test_fp8_rows_of_zeros_and_of_what_is_not_finite():
    x, qweight, scale, bias = call_of("fp8", (4,), torch.float32)
    x[1], x[2, 3], x[3, 4] = 0, float("inf"), float("nan")
    out = fp8_linear_reference(x, qweight, scale, bias)
    assert torch.equal(out[1], bias) and out[0].isfinite().all() and not out[2:].isfinite().any()


def test_without_columns_the_bias_is_left():
    bias = normal(3)
    qweight, scale = fp8.quantize_weight(torch.empty(3, 0))
    assert torch.equal(fp8.LINEAR(torch.empty(2, 0), qweight, scale, bias), bias.expand(2, 3))
    empty = torch.empty(3, 0, dtype=torch.uint8)
    assert torch.equal(sparse24.LINEAR(torch.empty(2, 0), torch.empty(3, 0), empty, bias), bias.expand(2, 3))
