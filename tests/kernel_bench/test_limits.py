"""The least time that a product takes: bytes, operations, datasheets."""

from dataclasses import replace

import pytest
from toy_bench import TINY

from fxc.kernel_bench import limits
from fxc.kernel_bench.limits import Peaks, limit_us, moved_bytes, weight_bytes
from fxc.kernel_bench.weights import all_schemes, format_of, make


@pytest.mark.parametrize(
    ("scheme", "each", "besides"),
    [
        ("float32", 4, 0), ("bf16", 2, 0), ("int8", 1, 4), ("int8_weight_only", 1, 4), ("fp8", 1, 4),
        ("int4_g128", 0.515625, 0), ("int4_g64", 0.53125, 0), ("int4_g32", 0.5625, 0), ("int4_g128_zero", 0.5234375, 0),
        ("sparse24", 1.125, 0), ("int8_sparse24", 0.625, 4),
    ],
)  # fmt: skip
def test_bytes_of_a_weight(scheme, each, besides):
    assert weight_bytes(scheme, 3584, 18944) == each * 3584 * 18944 + besides * 3584


@pytest.mark.parametrize("scheme", ["bf16", *all_schemes(), "int4_g128_zero"])
def test_the_bytes_are_those_that_are_stored(scheme):
    stored = sum(part.nbytes for part in make(format_of(scheme), TINY).parts)
    assert stored / (2 if scheme == "bf16" else 1) == weight_bytes(scheme, TINY.n, TINY.k)


def test_a_limit_is_the_larger_of_bytes_and_operations():
    peaks = Peaks("test", bandwidth=1e12, bf16=1e14, int8=2e14, sparse=True)
    assert moved_bytes("bf16", 1000, 2000, 10) == 2 * (1000 * 2000 + 10 * 2000 + 10 * 1000)
    assert limit_us(peaks, "bf16", 1000, 2000, 10) == pytest.approx(4.06e6 / 1e12 * 1e6)
    compute = 2 * 1000 * 2000 * 5000 / 1e14 * 1e6
    assert limit_us(peaks, "bf16", 1000, 2000, 5000) == pytest.approx(compute)
    assert limit_us(peaks, "int8", 1000, 2000, 5000) == pytest.approx(compute / 2)
    assert limit_us(peaks, "sparse24", 1000, 2000, 5000) == pytest.approx(compute / 2)
    assert limit_us(replace(peaks, sparse=False), "sparse24", 1000, 2000, 5000) == pytest.approx(compute)
    assert limit_us(peaks, "float32", 1000, 2000, 5000) is None, "its speed is not known"
    assert limit_us(peaks, "fp8", 1000, 2000, 5000) == pytest.approx(compute), "without fp8 products they are bf16 ones"


def test_the_speed_ups_that_bytes_allow_are_the_known_ones():
    h200 = limits.datasheet("nvidia-h200")
    schemes = ("bf16", "int8", "int4_g128", "sparse24", "int8_sparse24")
    one = {scheme: limit_us(h200, scheme, 8192, 8192, 1) for scheme in schemes}
    ratios = {scheme: one["bf16"] / us for scheme, us in one.items()}
    assert ratios["int8"] == pytest.approx(2.0, rel=0.01) and ratios["int4_g128"] == pytest.approx(3.88, rel=0.01)
    assert ratios["sparse24"] == pytest.approx(1.78, rel=0.01) and ratios["int8_sparse24"] == pytest.approx(3.2, rel=0.01)
    # The bytes of a bfloat16 weight and of its products are level at 206 rows, but for those of x and y.
    assert limit_us(h200, "bf16", 1 << 20, 1 << 20, 200) == pytest.approx(limit_us(h200, "bf16", 1 << 20, 1 << 20, 1), rel=0.01)
    assert limit_us(h200, "bf16", 1 << 20, 1 << 20, 212) > 1.02 * limit_us(h200, "bf16", 1 << 20, 1 << 20, 1)


def test_datasheets_are_found_by_the_chips_name():
    assert limits.datasheet("nvidia-h100-pcie").bandwidth == 2.0e12
    assert limits.datasheet("nvidia-h100-80gb-hbm3").bandwidth == 3.35e12
    assert limits.datasheet("nvidia-a100-sxm4-80gb").fp8 is None
    assert limits.datasheet("nvidia-geforce-gtx-1080") is None
