import pytest
import torch
from layers import hessian_of, layer

from fxc.calibrate.gptq import gptq
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.levels import Levels
from fxc.calibrate.qronos import corrected, qronos
from fxc.errors import InputRefused


def streams(dead=0, samples=300, rank=0):
    """(weight, what the layer reads, what it would read): they differ as layers before it that were compressed make them."""
    weight, y = layer(samples=samples, rank=rank)
    made = torch.Generator().manual_seed(9)
    x = y @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=made)) + 0.1 * torch.randn(y.shape, generator=made)
    x[:, :dead] = 0
    return weight, x, y


def statistics(x, y, dtype=torch.float32):
    both = Hessian(64, cross=True, dtype=dtype)
    both.add(x, y)
    return both.mean, both.cross


def gap(weight, made, x, y):
    """|Y w - X m|^2 in float64."""
    return float((y.double() @ weight.double().t() - x.double() @ made.double().t()).square().sum())


def test_the_correction_is_least_squares_on_the_samples():
    weight, x, y = streams()
    found = corrected(weight, *statistics(x, y, torch.float64), damp=0.0)
    expected = torch.linalg.lstsq(x.double(), y.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert gap(weight, found, x, y) < 0.5 * gap(weight, weight, x, y)


def test_damping_pulls_towards_the_weight():
    """Ridge regression towards w, told in float64 by adding the rows that say so."""
    weight, x, y = streams()
    damp = 0.05
    strength = (damp * hessian_of(x).diagonal().mean() * len(x) / 2).sqrt() * torch.eye(64, dtype=torch.float64)
    rows, outputs = torch.cat([x.double(), strength]), torch.cat([y.double(), strength]) @ weight.double().t()
    expected = torch.linalg.lstsq(rows, outputs).solution.t()
    torch.testing.assert_close(corrected(weight, *statistics(x, y), damp=damp).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", [Levels(4, 32), Levels(3, 32, symmetric=False)])
def test_it_comes_nearer_to_the_uncompressed_output_than_gptq(levels):
    weight, x, y = streams()
    hessian, cross = statistics(x, y)
    made = qronos(weight, hessian, cross, levels)
    assert gap(weight, made.dense(), x, y) < 0.7 * gap(weight, gptq(weight, hessian, levels).dense(), x, y)


def test_without_a_difference_between_the_streams_it_is_gptq():
    weight, x, _ = streams()
    hessian, cross = statistics(x, x)
    assert torch.equal(hessian, cross)
    one, other = qronos(weight, hessian, cross, Levels(4, 32)), gptq(weight, hessian, Levels(4, 32))
    assert torch.equal(one.q, other.q) and torch.equal(one.scale, other.scale)


def test_zeros_that_are_kept_stay():
    weight, x, y = streams()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    made = qronos(weight, *statistics(x, y), Levels(4, 32), keep=keep)
    assert not made.dense()[~keep].any()


@pytest.mark.parametrize(("samples", "rank"), [(1, 0), (300, 3)])
@pytest.mark.parametrize("damp", [1e-3, 0.0])
def test_few_samples_and_a_deficient_hessian_work(samples, rank, damp):
    weight, y = layer(samples=samples, rank=rank)
    x = y @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(9)))
    hessian, cross = statistics(x, y)
    aim = corrected(weight, hessian, cross, damp)
    assert gap(weight, aim, x, y) < 0.1 * gap(weight, weight, x, y)
    assert (aim - weight).norm() < 1.5 * weight.norm()
    assert qronos(weight, hessian, cross, Levels(4, 32), correction_damp=damp).dense().isfinite().all()


def test_channels_that_nothing_reaches_keep_their_weights():
    weight, x, y = streams(dead=5)
    aim = corrected(weight, *statistics(x, y))
    torch.testing.assert_close(aim[:, :5], weight[:, :5])
    untouched = torch.zeros(64, 64)
    assert torch.equal(qronos(weight, untouched, untouched, Levels(4, 32)).q, gptq(weight, untouched, Levels(4, 32)).q)


def test_statistics_of_another_layer_are_refused():
    weight, x, y = streams()
    hessian, cross = statistics(x, y)
    with pytest.raises(InputRefused, match="cross statistic"):
        qronos(weight, hessian, cross[:32], Levels(4, 32))
    with pytest.raises(InputRefused, match="cross statistic"):
        qronos(weight, hessian, cross * torch.nan, Levels(4, 32))
    with pytest.raises(InputRefused, match="groups of 128"):
        qronos(weight, hessian, cross, Levels(4, 128))
