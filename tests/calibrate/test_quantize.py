import pytest
import torch
from layers import layer, output_loss

from fxc.calibrate.hessian import Hessian
from fxc.calibrate.levels import Levels
from fxc.calibrate.qronos import corrected
from fxc.calibrate.quantize import STATISTICS, quantized

LEVELS = Levels(4, 32)


def streams(samples=300, dead=0, rank=0):
    """(weight, what its layer reads, what it would read)."""
    weight, y = layer(samples=samples, dead=dead, rank=rank)
    return weight, y @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(9))), y


def statistic(algorithm, x, y):
    made = STATISTICS[algorithm](64)
    made.add(*((x, y) if algorithm in ("qronos", "round") else (x,)))
    return made


def gap(weight, made, x, y):
    """|Y w - X m|^2 / |Y w|^2 in float64."""
    aim = y.double() @ weight.double().t()
    return float((aim - x.double() @ made.double().t()).square().sum() / aim.square().sum())


def test_each_is_nearer_to_the_float_layer_than_the_one_before():
    weight, x, y = streams()
    found = {each: quantized(each, weight, statistic(each, x, y), LEVELS) for each in STATISTICS}
    gaps = [gap(weight, found[each].dense(), x, y) for each in ("grid", "gptq", "qronos")]
    assert gaps[2] < 0.7 * gaps[1] and gaps[1] < gaps[0]
    assert output_loss(weight, found["gptq"].dense(), x) < 0.7 * output_loss(weight, found["grid"].dense(), x)


def test_the_error_of_qronos_is_the_gap_to_what_the_float_layer_gave():
    weight, x, y = streams()
    both = statistic("qronos", x, y)
    made = quantized("qronos", weight, both, LEVELS)
    assert made.error == pytest.approx(gap(weight, made.dense(), x, y), rel=1e-3)
    assert made.error > output_loss(corrected(weight, both.mean, both.cross), made.dense(), x)


@pytest.mark.parametrize("algorithm", STATISTICS)
@pytest.mark.parametrize(("samples", "dead", "rank"), [(300, 32, 0), (300, 64, 0), (300, 0, 3), (1, 0, 0)])
def test_dead_inputs_a_deficient_hessian_and_one_sample_work(algorithm, samples, dead, rank):
    weight, x, y = streams(samples, dead, rank)
    if dead:
        x = y
    found = [quantized(algorithm, weight, statistic(algorithm, x, y), LEVELS) for _ in range(2)]
    assert torch.equal(found[0].q, found[1].q) and found[0].dense().isfinite().all()
    assert (found[0].dense() - weight).norm() < 1.5 * weight.norm()
    assert 0 <= found[0].error < 0.2


@pytest.mark.parametrize("algorithm", STATISTICS)
@pytest.mark.parametrize("levels", [LEVELS, Levels(4, 32, symmetric=False)])
def test_zeros_that_are_kept_stay(algorithm, levels):
    weight, x, y = streams()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    made = quantized(algorithm, weight, statistic(algorithm, x, y), levels, keep)
    assert not made.dense()[~keep].any() and made.dense()[keep].count_nonzero() > 0.7 * keep.sum()


def test_the_uncompressed_second_moment_is_added_up_batch_by_batch():
    _, x, y = streams()
    both = Hessian(64, cross=True, dtype=torch.float64)
    for part in (slice(0, 100), slice(100, 300)):
        both.add(x[part], y[part])
    torch.testing.assert_close(both.uncompressed, 2 * y.double().t() @ y.double() / 300)
