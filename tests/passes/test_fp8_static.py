"""fp8:mode=static: one scale for all that a layer reads, from data."""

import pytest
import torch
from torch import nn

import fxc
from fxc.calibrate.ranges import Range
from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.schemes import fp8


def nearest(value: float) -> float:
    """Of all e4m3 numbers by their definition, the one nearest to it; of two, the even one."""
    numbers = [(2.0 ** (e - 7)) * (1 + m / 8) if e else m * 2.0**-9 for e in range(16) for m in range(8)][:-1]
    at = min(range(len(numbers)), key=lambda n: (abs(numbers[n] - abs(value)), n % 2))
    return numbers[at] if value >= 0 else -numbers[at]


def test_the_operator_rounds_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 12, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(3, 12, generator=generator) * 3
    q, scale = fp8.quantize_weight(weight)
    x_scale = 0.01  # some are cut off: above 4.48
    rounded = torch.tensor([[nearest(v / x_scale) * x_scale for v in row] for row in x.tolist()], dtype=torch.float64)
    expected = rounded @ (q.double() * scale.double()[:, None]).t() + bias.double()
    assert (x.abs() > 4.48).any() and rounded.abs().max() == pytest.approx(4.48)
    torch.testing.assert_close(fp8.STATIC(x, q, scale, bias, x_scale).double(), expected, rtol=1e-5, atol=1e-5)
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="x_scale"):
            fp8.STATIC(x, q, scale, bias, wrong)


def test_the_scale_is_of_the_largest_number_in_the_data(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    calib = [torch.randn(8, 32) for _ in range(4)]
    made = fxc.optimize(model, (calib[0],), "fp8:mode=static", calib=calib)
    first, second = (node for node in made.program.graph.nodes if node.target is fp8.STATIC)
    assert Call(first)["x_scale"] == pytest.approx(torch.cat(calib).abs().max().item() / 448, rel=1e-6)
    assert Call(second)["x_scale"] != Call(first)["x_scale"]
    assert "the largest errors of inputs" in made.report["passes"][-1]["notes"][0]
    with torch.no_grad():
        (found,), expected = made.program.module()(calib[0]), model(calib[0])
    assert (found - expected).norm() < 0.06 * expected.norm()
    made.save(tmp_path / "out")
    assert str(fxc.load(tmp_path / "out").program) == str(made.program)
    with pytest.raises(UsageError, match="mode=static is measured on calibration data"):
        fxc.optimize(model, (calib[0],), "fp8:mode=static")


def test_the_error_that_is_told_is_that_of_the_numbers():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    seen = Range()
    seen.add(x)
    scale = seen.float_scale(448.0)
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    told = seen.error_of(lambda v: (v / scale).float().to(torch.float8_e4m3fn).double() * scale)
    assert told == pytest.approx(((rounded - x).square().sum() / x.square().sum()).item(), rel=0.05)
    assert Range().float_scale(448.0) == 1.0 and Range().error_of(lambda v: v) == 0.0
