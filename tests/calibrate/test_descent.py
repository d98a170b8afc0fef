import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate import descent
from fxc.calibrate.descent import descend
from fxc.calibrate.gptq import gptq
from fxc.calibrate.grid import nearest
from fxc.calibrate.levels import Levels
from fxc.errors import InputRefused

KINDS = [Levels(4, 32), Levels(3, 32, symmetric=False), Levels(2, 64), Levels(4, -1, kept=torch.bfloat16)]


def objective(weight, made, hessian, damp=0.01):
    """tr(D H D^T) by row with the damped H, float64."""
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    gap = made.double() - weight.double()
    return ((gap @ h) * gap).sum(1)


@pytest.mark.parametrize("levels", KINDS)
@pytest.mark.parametrize("block", [128, 24])
def test_it_never_loses_and_mostly_gains(levels, block):
    weight, inputs = layer(rows=12)
    hessian = hessian_of(inputs)
    made = gptq(weight, hessian, levels)
    better = descend(weight, hessian, made, block=block)
    assert (objective(weight, better.dense(), hessian) <= objective(weight, made.dense(), hessian) * (1 + 1e-5)).all()
    assert better.error < 0.95 * made.error
    assert better.error == pytest.approx(output_loss(weight, better.dense(), inputs), rel=1e-3)
    assert better.scale.dtype == levels.kept and int(better.q.max()) < 2**levels.bits
    assert (made.zero is None and better.zero is None) or torch.equal(made.zero, better.zero)


@pytest.mark.parametrize("levels", KINDS)
def test_in_the_end_no_other_level_of_any_number_would_be_better(levels):
    """Every change of one number by itself, tried in float64."""
    weight, inputs = layer(rows=3)
    hessian = hessian_of(inputs)
    made = descend(weight, hessian, nearest(weight, levels), passes=50)
    dense, width = made.dense(), levels.width(64)
    reached = objective(weight, dense, hessian)
    for k in range(64):
        for code in range(2**levels.bits):
            other = dense.clone()
            zero = levels.middle if made.zero is None else made.zero[:, k // width].float()
            other[:, k] = (code - zero) * made.scale[:, k // width].float()
            assert (objective(weight, other, hessian) >= reached * (1 - 1e-4)).all()


def test_scales_are_the_least_squares_ones_for_the_levels():
    weight, inputs = layer(rows=3)
    hessian = hessian_of(inputs)
    made = descend(weight, hessian, nearest(weight, Levels(4, 32)), passes=50)
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    half = torch.linalg.cholesky(h).t()
    for row in range(3):
        steps = (made.q[row].double() - 8).unflatten(0, (2, 32))
        columns = torch.block_diag(*steps[:, :, None]).double()
        best = torch.linalg.lstsq(half @ columns, half @ weight[row, :, None].double()).solution.squeeze(1)
        torch.testing.assert_close(made.scale[row].double(), best, rtol=1e-3, atol=1e-5)


def test_scales_are_fitted_a_few_rows_at_a_time(monkeypatch):
    weight, inputs = layer(rows=7)
    hessian = hessian_of(inputs)
    first = nearest(weight, Levels(4, 32))
    whole = descend(weight, hessian, first)
    monkeypatch.setattr(descent, "FITTED", 3 * 2 * 2)
    parts = descend(weight, hessian, first)
    assert torch.equal(parts.q, whole.q)
    torch.testing.assert_close(parts.scale, whole.scale)


def test_zeros_of_a_mask_stay():
    weight, inputs = layer(rows=12)
    hessian = hessian_of(inputs)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    made = gptq(weight, hessian, Levels(4, 32), keep=keep)
    better = descend(weight, hessian, made, keep=keep)
    assert not better.dense()[~keep].any()
    assert better.error < 0.95 * made.error


@pytest.mark.parametrize(("samples", "rank", "dead"), [(1, 0, 0), (300, 3, 0), (300, 0, 40), (0, 0, 0)])
def test_few_samples_dead_inputs_and_none_at_all_work(samples, rank, dead):
    weight, inputs = layer(samples=samples, rank=rank, dead=dead)
    weight[1] = 0
    hessian = hessian_of(inputs).float() if samples else torch.zeros(64, 64)
    made = gptq(weight, hessian, Levels(4, 32))
    better = descend(weight, hessian, made)
    assert better.dense().isfinite().all() and not better.dense()[1].any()
    assert better.error <= made.error * 1.01
    assert (better.dense() - weight).abs().max() < 1.5 * weight.abs().max()


def test_no_rows_work_and_other_statistics_are_refused():
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    made = gptq(weight, hessian, Levels(4, 32))
    assert descend(weight[:0], hessian, gptq(weight[:0], hessian, Levels(4, 32))).q.shape == (0, 64)
    with pytest.raises(InputRefused, match="reads 64 channels"):
        descend(weight, hessian[:32, :32], made)
