from itertools import pairwise

import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.masks import keep_n_of_m, pruned
from fxc.calibrate.refit import refit
from fxc.calibrate.sparsegpt import sparsegpt
from fxc.errors import InputRefused


def best(weight, keep, hessian, damp=0.01):
    """The normal equations of each row's own columns, float64."""
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    made = torch.zeros_like(weight, dtype=torch.float64)
    for row, stays in enumerate(keep):
        made[row, stays] = torch.linalg.solve(h[stays][:, stays], h[stays] @ weight[row].double())
    return made


def test_it_is_least_squares_over_what_stays():
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    keep = keep_n_of_m(weight.abs())
    keep[3], keep[4] = True, False
    made = refit(weight, keep, hessian, steps=200)
    expected = best(weight, keep, hessian)
    torch.testing.assert_close(made.weight.double(), expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(made.weight[3], weight[3]) and not made.weight[~keep].any()
    assert made.error == pytest.approx(output_loss(weight, expected, inputs), rel=1e-3)


def test_thirty_steps_are_nearly_enough_and_more_than_a_sweep_finds():
    weight, inputs = layer(rows=20)
    hessian = hessian_of(inputs)
    swept = sparsegpt(weight, hessian)
    made = refit(weight, swept.keep, hessian)
    assert made.error < 1.02 * output_loss(weight, best(weight, swept.keep, hessian), inputs)
    assert made.error < 0.9 * swept.error < pruned(weight, swept.keep, hessian).error


def test_every_step_helps():
    weight, inputs = layer()
    hessian = hessian_of(inputs)
    keep = keep_n_of_m(weight.abs())
    errors = [refit(weight, keep, hessian, steps=steps, damp=0.0).error for steps in range(8)]
    assert errors[0] == pytest.approx(pruned(weight, keep, hessian).error, rel=1e-4)
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize(("samples", "rank", "dead"), [(1, 0, 0), (300, 3, 0), (300, 0, 40), (0, 0, 0)])
@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_few_samples_dead_inputs_and_none_at_all_work(samples, rank, dead, damp):
    weight, inputs = layer(samples=samples, rank=rank, dead=dead)
    weight[1] = 0
    hessian = hessian_of(inputs).float() if samples else torch.zeros(64, 64)
    keep = keep_n_of_m(weight.abs())
    made = refit(weight, keep, hessian, damp=damp)
    assert made.weight.isfinite().all() and not made.weight[~keep].any() and not made.weight[1].any()
    assert made.error <= pruned(weight, keep, hessian).error
    assert torch.equal(made.weight[:, :dead], (weight * keep)[:, :dead])


def test_no_rows_work_and_other_statistics_are_refused():
    _, inputs = layer()
    nothing = torch.empty(0, 64)
    assert refit(nothing, nothing.bool(), hessian_of(inputs)).weight.shape == (0, 64)
    with pytest.raises(InputRefused, match="reads 64 channels"):
        refit(torch.ones(2, 64), torch.ones(2, 64).bool(), torch.eye(32))
