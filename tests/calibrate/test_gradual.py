import pytest
import torch
from layers import hessian_of, layer

from fxc.calibrate.gradual import gradual
from fxc.calibrate.masks import keep_share
from fxc.calibrate.sparsegpt import sparsegpt
from fxc.errors import InputRefused


def naive(weight, hessian, sparsity, rounds, damp=0.01):
    """Float64, the inverse and the normal equations of each row written out."""
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    freedom = torch.linalg.inv(h).diagonal()
    made = weight.double()
    for t in range(1, rounds + 1):
        gone = int(sparsity * (1 - (1 - t / rounds) ** 3) * weight.numel() + 1e-9)
        cost = (made.square() / freedom).flatten()
        stays = torch.ones(weight.numel(), dtype=torch.bool)
        stays[cost.argsort()[:gone]] = False
        stays = stays.view_as(weight)
        made = torch.zeros_like(made)
        for row, kept in enumerate(stays):
            made[row, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight[row].double())
    return made


def test_it_is_what_its_formula_says():
    """An input of channels that hardly depend on each other: there the rounds do not hang on the last digits."""
    weight, _ = layer()
    inputs = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
    made = gradual(weight, hessian_of(inputs), 0.5, rounds=4)
    expected = naive(weight, hessian_of(inputs), 0.5, 4)
    assert torch.equal(made.keep, expected != 0)
    torch.testing.assert_close(made.weight.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("by_row", [True, False])
def test_it_beats_sparsegpt_by_far(by_row):
    weight, inputs = layer(rows=20)
    hessian = hessian_of(inputs)
    made = gradual(weight, hessian, 0.5, by_row=by_row)
    assert made.error < 0.6 * sparsegpt(weight, hessian, None, 0.5).error
    assert not made.weight[~made.keep].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
def test_as_much_goes_as_was_asked(sparsity):
    weight, inputs = layer(rows=10, columns=160)
    hessian = hessian_of(inputs)
    assert float((~gradual(weight, hessian, sparsity).keep).float().mean()) == pytest.approx(sparsity, abs=1e-3)
    of_rows = (~gradual(weight, hessian, sparsity, by_row=True).keep).float().mean(1)
    torch.testing.assert_close(of_rows, torch.full((10,), sparsity))


@pytest.mark.parametrize(("samples", "rank", "dead"), [(1, 0, 0), (300, 3, 0), (300, 0, 8)])
def test_few_samples_and_dead_inputs_work(samples, rank, dead):
    weight, inputs = layer(samples=samples, rank=rank, dead=dead)
    made = gradual(weight, hessian_of(inputs).float(), 0.5)
    assert made.weight.isfinite().all() and int(made.keep.sum()) == weight.numel() // 2
    assert made.keep[:, :dead].float().mean().nan_to_num() < 0.5


def test_a_layer_that_nothing_reached_is_pruned_by_magnitude():
    weight, _ = layer()
    made = gradual(weight, torch.zeros(64, 64), 0.5)
    assert torch.equal(made.weight, weight * keep_share(weight.abs(), 0.5, by_row=False))


def test_what_cannot_be_pruned_is_refused():
    weight, inputs = layer()
    with pytest.raises(InputRefused, match="sparsity="):
        gradual(weight, hessian_of(inputs), 1.5)
    with pytest.raises(InputRefused, match="reads 64 channels"):
        gradual(weight, torch.eye(32), 0.5)
