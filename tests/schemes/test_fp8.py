"""fp8: every byte, and what rounding may cost."""

from __future__ import annotations

import torch
from formats import DTYPES, normal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fxc.schemes import fp8


def test_every_byte_is_the_fp8_number_of_the_picture():
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        found = fp8.unpack(torch.tensor([byte], dtype=torch.uint8)).item()
        if byte & 0x7F == 0x7F:
            assert found != found
        else:
            assert found == (-value if byte & 0x80 else value)
            assert fp8.pack(torch.tensor([found])).item() == byte
    assert fp8.pack(torch.tensor([1e9, -float("inf")])).tolist() == [0x7E, 0xFE]


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from(DTYPES), seeds)
def test_fp8_weights_are_within_a_sixteenth(rows, columns, dtype, seed):
    weight = normal(rows, columns, seed=seed, dtype=dtype)
    weight[seed % rows] *= seed % 2
    qweight, scale = fp8.quantize_weight(weight)
    assert qweight.dtype == torch.float8_e4m3fn and scale.shape == (rows,) and (scale > 0).all()
    error = (fp8.dequantize(qweight, scale) - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs() / 16, scale[:, None] / 1024) * 1.0001).all()
    assert torch.equal(fp8.unpack(qweight.view(torch.uint8)), qweight.float())
