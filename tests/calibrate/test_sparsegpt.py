import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.gptq import gptq
from fxc.calibrate.levels import Levels
from fxc.calibrate.masks import keep_n_of_m, keep_share, pruned
from fxc.calibrate.sparsegpt import sparsegpt
from fxc.calibrate.wanda import scores
from fxc.errors import InputRefused


def naive(weight, hessian, step, lowest, damp=0.01):
    """Column by column in float64, the inverse of what is left of H taken anew for each. lowest(costs [N, step]) -> bool."""
    work, h = weight.double().clone(), hessian.double()
    mean = h.diagonal().mean()
    h = h + damp * (mean if mean > 0 else 1.0) * torch.eye(len(h), dtype=torch.float64)
    columns = len(h)
    freedom = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)])
    gone = torch.zeros_like(work, dtype=torch.bool)
    for j in range(columns):
        if j % step == 0:
            gone[:, j : j + step] = lowest(work[:, j : j + step].square() / freedom[j : j + step])
        inverse = torch.linalg.inv(h[j:, j:])
        error = torch.where(gone[:, j], work[:, j], 0.0)
        work[:, j:] -= (error / inverse[0, 0])[:, None] * inverse[0]
    return work.masked_fill(gone, 0)


def two_of_four(costs):
    gone = torch.zeros_like(costs, dtype=torch.bool)
    for row, cost in enumerate(costs):
        gone[row, cost.sort().indices[:2]] = True
    return gone


def half(costs):
    flat = torch.zeros(costs.numel(), dtype=torch.bool)
    flat[costs.flatten().sort().indices[: costs.numel() // 2]] = True
    return flat.view_as(costs)


@pytest.mark.parametrize(("pattern", "step", "lowest"), [((2, 4), 4, two_of_four), (None, 32, half)])
def test_it_is_optimal_brain_surgeon_with_masks_chosen_on_the_way(pattern, step, lowest):
    weight, inputs = layer()
    made = sparsegpt(weight, hessian_of(inputs), pattern, 0.5, block=32)
    expected = naive(weight, hessian_of(inputs), step, lowest)
    assert torch.equal(made.keep, expected != 0) and torch.equal(made.weight != 0, made.keep)
    torch.testing.assert_close(made.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert made.error == pytest.approx(output_loss(weight, expected, inputs), rel=1e-2)


@pytest.mark.parametrize(("pattern", "share"), [((2, 4), 0.6), (None, 0.8)])
def test_it_beats_masks_that_are_not_made_up_for(pattern, share):
    weight, inputs = layer(rows=20)
    hessian = hessian_of(inputs)
    found = scores(weight, hessian.diagonal())
    keep = keep_n_of_m(found) if pattern else keep_share(found, 0.5, by_row=True)
    assert sparsegpt(weight, hessian, pattern).error < share * pruned(weight, keep, hessian).error


@pytest.mark.parametrize(("pattern", "sparsity"), [((2, 4), 0.5), ((1, 4), 0.75), ((4, 8), 0.5), (None, 0.25), (None, 0.9)])
def test_as_much_goes_as_was_asked(pattern, sparsity):
    weight, inputs = layer(rows=10, columns=160)
    made = sparsegpt(weight, hessian_of(inputs), pattern, sparsity)
    assert float((made.weight == 0).float().mean()) == pytest.approx(sparsity, abs=1e-3)
    if pattern:
        n, m = pattern
        assert (made.keep.unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize("levels", [Levels(4, 32), Levels(4, 32, symmetric=False)])
def test_pruned_and_quantized_in_one_solve(levels):
    weight, inputs = layer(rows=20, columns=64)
    hessian = hessian_of(inputs)
    keep = sparsegpt(weight, hessian).keep
    made = gptq(weight, hessian, levels, keep=keep)
    assert not made.dense()[~keep].any()
    after = gptq(weight * keep, hessian, levels, keep=keep)
    assert made.error < 0.8 * output_loss(weight, after.dense(), inputs)


@pytest.mark.parametrize("pattern", [(2, 4), None])
def test_dead_channels_go_before_others(pattern):
    weight, inputs = layer(rows=100, dead=2)
    made = sparsegpt(weight, hessian_of(inputs), pattern)
    assert made.keep[:, :2].float().mean() < 0.4
    assert made.weight.isfinite().all()


@pytest.mark.parametrize("pattern", [(2, 4), None])
def test_a_layer_that_nothing_reached_is_pruned_by_magnitude(pattern):
    weight, _ = layer(columns=32)
    made = sparsegpt(weight, torch.zeros(32, 32), pattern)
    keep = keep_n_of_m(weight.abs()) if pattern else keep_share(weight.abs(), 0.5, by_row=False)
    assert torch.equal(made.weight, weight * keep) and made.error == 0


@pytest.mark.parametrize(("samples", "rank"), [(1, 0), (300, 3)])
def test_few_samples_and_a_deficient_hessian_work(samples, rank):
    weight, inputs = layer(samples=samples, rank=rank)
    hessian = hessian_of(inputs).float()
    made = sparsegpt(weight, hessian, damp=0.0)
    assert made.weight.isfinite().all()
    assert made.error < 0.1 * pruned(weight, keep_n_of_m(weight.abs()), hessian).error
    assert torch.equal(made.weight, sparsegpt(weight, hessian, damp=0.0).weight)


def test_no_rows_work():
    _, inputs = layer()
    assert sparsegpt(torch.empty(0, 64), hessian_of(inputs)).weight.shape == (0, 64)


def test_what_cannot_be_pruned_is_refused():
    weight, inputs = layer(columns=66)
    hessian = hessian_of(inputs)
    with pytest.raises(InputRefused, match="2 of 4 cannot be kept in rows of 66"):
        sparsegpt(weight, hessian)
    with pytest.raises(InputRefused, match="blocks of 6 columns"):
        sparsegpt(weight, hessian, block=6)
    with pytest.raises(InputRefused, match="sparsity=1"):
        sparsegpt(weight, hessian, None, 1.0)
