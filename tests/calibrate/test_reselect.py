from itertools import combinations

import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.masks import keep_n_of_m, pruned
from fxc.calibrate.reselect import reselect
from fxc.calibrate.sparsegpt import sparsegpt

DAMP = 0.01


def naive(weight, made, hessian, passes):
    """Row by row, group by group, choice by choice, in float64."""
    w, v, h = weight.double(), made.double().clone(), hessian.double()
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    for _ in range(passes):
        for row in range(len(w)):
            for at in range(0, w.shape[1], 4):
                best, least = None, None
                for choice in combinations(range(at, at + 4), 2):
                    tried = v[row].clone()
                    tried[at : at + 4] = 0
                    chosen = list(choice)
                    right = (h @ (w[row] - tried))[chosen]
                    tried[chosen] = torch.linalg.solve(h[chosen][:, chosen], right)
                    gap = w[row] - tried
                    if least is None or gap @ h @ gap < least:
                        best, least = tried, gap @ h @ gap
                v[row] = best
    return v


@pytest.mark.parametrize("passes", [1, 3])
def test_each_group_takes_the_best_choice_given_all_others(passes):
    weight, inputs = layer(rows=5, columns=32)
    hessian = hessian_of(inputs)
    first = sparsegpt(weight, hessian)
    found = reselect(weight, first, hessian, passes=passes, block=16)
    torch.testing.assert_close(found.weight.double(), naive(weight, first.weight, hessian, passes), rtol=1e-3, atol=1e-4)
    assert found.error == pytest.approx(output_loss(weight, found.weight, inputs), rel=1e-3)


def test_it_beats_the_sweep_and_its_zeros_are_2_of_4():
    weight, inputs = layer(rows=20, columns=128, samples=1000)
    hessian = hessian_of(inputs)
    first = sparsegpt(weight, hessian)
    found = reselect(weight, first, hessian)
    assert found.error < 0.6 * first.error
    assert torch.equal(found.keep, found.weight != 0) and (found.keep.unflatten(1, (-1, 4)).sum(-1) <= 2).all()


@pytest.mark.parametrize(("dead", "rank", "samples"), [(20, 0, 300), (0, 3, 300), (0, 0, 1), (64, 0, 300)])
def test_dead_inputs_few_directions_and_one_sample(dead, rank, samples):
    weight, inputs = layer(rows=10, samples=samples, dead=dead, rank=rank)
    hessian = hessian_of(inputs)
    first = pruned(weight, keep_n_of_m(weight.abs()), hessian)
    found = reselect(weight, first, hessian)
    assert found.weight.isfinite().all() and found.error <= first.error + 1e-6
    assert (found.keep.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
