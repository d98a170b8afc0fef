import pytest
import torch
from layers import hessian_of, layer

from fxc.calibrate.masks import keep_n_of_m, keep_share, pruned
from fxc.calibrate.wanda import scores
from fxc.errors import InputRefused


def test_scores_order_each_row_as_magnitude_times_norm():
    weight, inputs = layer(rows=20, columns=32)
    found = scores(weight, inputs.square().mean(0))
    naive = weight.double().abs() * inputs.double().norm(dim=0)
    assert torch.equal(found.argsort(dim=1), naive.argsort(dim=1))
    assert not torch.equal(keep_share(found, 0.5, by_row=True), keep_share(weight.abs(), 0.5, by_row=True))


@pytest.mark.parametrize("keep", [keep_n_of_m, lambda s: keep_share(s, 0.5, by_row=True)])
def test_it_beats_magnitude_where_channels_differ(keep):
    weight, inputs = layer(rows=20)
    hessian = hessian_of(inputs)
    by_scores = pruned(weight, keep(scores(weight, hessian.diagonal())), hessian)
    assert by_scores.error < pruned(weight, keep(weight.abs()), hessian).error


def test_channels_that_nothing_reached_go_first_and_the_smallest_of_them_before_others():
    weight, inputs = layer(rows=20, dead=20)
    found = scores(weight, inputs.square().mean(0))
    assert found[:, :20].max() < found[:, 20:].abs().sort().values[:, 5:].min()
    assert torch.equal(found[:, :20].argsort(dim=1), weight[:, :20].abs().argsort(dim=1))


def test_a_layer_that_nothing_reached_is_pruned_by_magnitude():
    weight, _ = layer()
    assert torch.equal(keep_n_of_m(scores(weight, torch.zeros(64))), keep_n_of_m(weight.abs()))


def test_what_has_no_scores_is_refused():
    with pytest.raises(InputRefused, match="reads 8 channels"):
        scores(torch.ones(2, 8), torch.ones(7))
    with pytest.raises(InputRefused, match="NaN or Inf"):
        scores(torch.ones(2, 8), torch.full((8,), torch.inf))
