import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.gptq import gptq
from fxc.calibrate.grid import grid_scales, nearest, nearest_scales
from fxc.calibrate.levels import Levels
from fxc.errors import InputRefused

KINDS = [Levels(4, 32), Levels(4, 32, symmetric=False), Levels(3, 64), Levels(2, 32, symmetric=False), Levels(8, -1)]


def naive(weight, hessian, levels, scales, damp=0.01, keep=None):
    """One column at a time, in float64, with the inverse of what is left of H taken anew for each of them."""
    scale, zero = (each if each is None else each.double() for each in scales)
    work, h = weight.double().clone(), hessian.double()
    mean = h.diagonal().mean()
    h = h + damp * (mean if mean > 0 else 1.0) * torch.eye(len(h), dtype=torch.float64)
    width = levels.width(len(h))
    left = sorted(range(len(h)), key=lambda k: (-hessian[k, k].item(), k))
    made = torch.empty_like(work)
    while left:
        j = left[0]
        s, z = scale[:, j // width], 2 ** (levels.bits - 1) if zero is None else zero[:, j // width]
        aim = work[:, j] if keep is None else work[:, j] * keep[:, j]
        made[:, j] = s * ((aim / s).round() + z).clamp(0, 2**levels.bits - 1) - s * z
        inverse = torch.linalg.inv(h[left][:, left])
        work[:, left] -= ((work[:, j] - made[:, j]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return made


def agree(made, expected, inputs, weight):
    """float32 may round a number that lies halfway the other way, and all after it differ; the loss hardly does."""
    same = (made.dense().double() - expected).abs() < 1e-4
    assert same.double().mean() > 0.98
    found, wanted = output_loss(weight, made.dense(), inputs), output_loss(weight, expected, inputs)
    assert found == pytest.approx(wanted, rel=0.02)
    assert made.error == pytest.approx(found, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("levels", KINDS)
@pytest.mark.parametrize("block", [128, 24])
def test_gptq_is_optimal_brain_surgeon_column_by_column(levels, block):
    weight, inputs = layer()
    made = gptq(weight, hessian_of(inputs), levels, block=block)
    agree(made, naive(weight, hessian_of(inputs), levels, nearest_scales(weight, levels)), inputs, weight)
    assert made.error < 0.8 * nearest(weight, levels, hessian_of(inputs)).error


def test_blocks_change_nothing():
    weight, inputs = layer(rows=16, columns=160)
    one, many = (gptq(weight, hessian_of(inputs), Levels(4, 32), block=block) for block in (1000, 7))
    assert (one.q == many.q).double().mean() > 0.99
    assert one.error == pytest.approx(many.error, rel=0.01)


def test_scales_of_the_grid_are_used():
    weight, inputs = layer()
    levels = Levels(3, 32)
    scales = grid_scales(weight, levels, inputs.square().mean(0))
    made = gptq(weight, hessian_of(inputs), levels, scales)
    assert torch.equal(made.scale, scales[0])
    agree(made, naive(weight, hessian_of(inputs), levels, scales), inputs, weight)


@pytest.mark.parametrize("levels", [Levels(4, 32), Levels(4, 32, symmetric=False)])
def test_zeros_stay_and_are_made_up_for(levels):
    weight, inputs = layer()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    made = gptq(weight, hessian_of(inputs), levels, keep=keep)
    assert not made.dense()[~keep].any()
    agree(made, naive(weight, hessian_of(inputs), levels, nearest_scales(weight, levels), keep=keep), inputs, weight)
    assert made.error < 0.8 * output_loss(weight, nearest(weight * keep, levels).dense(), inputs)


def test_dead_columns_are_rounded_to_nearest_and_change_no_other():
    weight, inputs = layer(dead=32)
    levels = Levels(4, 32)
    made = gptq(weight, hessian_of(inputs), levels)
    assert torch.equal(made.q[:, :32], nearest(weight, levels).q[:, :32])
    alone = gptq(weight[:, 32:], hessian_of(inputs)[32:, 32:], levels, damp=0.005)
    assert (made.q[:, 32:] == alone.q).double().mean() > 0.98


def test_a_layer_that_nothing_reached_is_rounded_to_nearest():
    weight, _ = layer()
    made = gptq(weight, torch.zeros(64, 64), Levels(4, 32))
    assert torch.equal(made.q, nearest(weight, Levels(4, 32)).q) and made.error == 0


@pytest.mark.parametrize(("samples", "rank"), [(1, 0), (300, 3)])
@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_few_samples_and_a_deficient_hessian_work(samples, rank, damp):
    weight, inputs = layer(samples=samples, rank=rank)
    hessian = hessian_of(inputs).float()
    assert torch.linalg.cholesky_ex(hessian).info != 0
    made = gptq(weight, hessian, Levels(4, 32), damp=damp)
    assert made.dense().isfinite().all()
    assert made.error < 0.3 * nearest(weight, Levels(4, 32), hessian).error
    assert torch.equal(made.q, gptq(weight, hessian, Levels(4, 32), damp=damp).q)


@pytest.mark.fault(7)
def test_rows_of_zeros_stay_and_no_rows_work():
    weight, inputs = layer()
    weight[2] = 0
    made = gptq(weight, hessian_of(inputs), Levels(4, 32))
    assert not made.dense()[2].any()
    assert gptq(weight[:0], hessian_of(inputs), Levels(4, 32)).q.shape == (0, 64)


def test_the_best_of_a_tiny_case_is_nearly_reached():
    """All 4^6 rows of levels of a 2-bit layer: GPTQ is within a third of the best, nearest is not."""
    levels, found, plain = Levels(2, -1), [], []
    for seed in range(20):
        weight, inputs = layer(rows=1, columns=6, seed=seed)
        scale, _ = nearest_scales(weight, levels)
        every = torch.cartesian_prod(*[torch.arange(-2.0, 2)] * 6) * scale
        h = hessian_of(inputs).float()
        gap = every - weight
        best = ((gap @ h) * gap).sum(1).min() / ((weight @ h) * weight).sum()
        found.append(gptq(weight, h, levels).error / best)
        plain.append(nearest(weight, levels, h).error / best)
    assert min(found) > 0.999
    assert torch.tensor(found).median() < 1.35 < torch.tensor(plain).median()


def test_what_cannot_be_solved_is_refused():
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    with pytest.raises(InputRefused, match="groups of 128 do not divide rows of 64"):
        gptq(weight, hessian, Levels(4, 128))
    with pytest.raises(InputRefused, match="reads 64 channels"):
        gptq(weight, hessian[:32, :32], Levels(4, 32))
    with pytest.raises(InputRefused, match="NaN or Inf"):
        gptq(weight, hessian * torch.nan, Levels(4, 32))
    with pytest.raises(InputRefused, match="not positive semidefinite"):
        gptq(weight, hessian - 1e3 * torch.eye(64), Levels(4, 32))
    with pytest.raises(InputRefused, match="below zero"):
        gptq(weight, hessian, Levels(4, 32), damp=-1.0)
