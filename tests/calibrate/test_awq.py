import pytest
import torch
from layers import hessian_of, layer

from fxc.calibrate.awq import awq
from fxc.calibrate.grid import nearest
from fxc.calibrate.levels import Levels
from fxc.errors import InputRefused


def naive(weights, inputs, levels):
    """(best scale, its error): the grid in float64, the outputs computed from the samples themselves."""
    x = inputs.double()
    width = levels.width(x.shape[1])
    shares = []
    for weight in weights:
        for row in weight.double().abs():
            groups = row.view(-1, width)
            shares.append((groups / groups.amax(1, keepdim=True)).flatten())
    w_mean, x_mean = torch.stack(shares).mean(0), x.abs().mean(0)
    candidates = [torch.ones(x.shape[1], dtype=torch.float64)]
    for step in range(20):
        r = step / 20
        s = x_mean**r / (w_mean ** (1 - r) + 1e-4)
        candidates.append(s / (s.max() * s.min()).sqrt())
    whole = sum(float((x @ w.double().t()).square().sum()) for w in weights)

    def error(s):
        total = 0.0
        for w in weights:
            made = nearest(w * s.float(), levels).dense().double() / s
            total += float((x @ (made - w.double()).t()).square().sum())
        return total / whole

    errors = [error(s) for s in candidates]
    best = min(range(len(errors)), key=lambda i: errors[i])
    return candidates[best], errors[best], errors[0]


@pytest.mark.parametrize("levels", [Levels(4, 32), Levels(3, 32, symmetric=False), Levels(4, -1)])
def test_it_is_the_best_of_the_grid(levels):
    weights, inputs = [layer()[0], layer(rows=3, seed=1)[0]], layer()[1]
    inputs = inputs * torch.logspace(-1, 1, 64)
    scale, error = awq(weights, inputs.abs().mean(0), hessian_of(inputs).float(), levels)
    expected, least, without = naive(weights, inputs, levels)
    assert error == pytest.approx(least, rel=1e-3)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=1e-5)
    assert error < 0.9 * without


def test_the_diagonal_alone_will_do():
    weight, inputs = layer()
    inputs = inputs * torch.logspace(-1, 1, 64)
    scale, _ = awq([weight], inputs.abs().mean(0), hessian_of(inputs).diagonal().float(), Levels(4, 32))
    made = nearest(weight * scale, Levels(4, 32)).dense() / scale
    plain = nearest(weight, Levels(4, 32)).dense()
    assert ((inputs @ (made - weight).t()).square().sum()) < 0.9 * (inputs @ (plain - weight).t()).square().sum()


def test_a_layer_that_nothing_reached_is_left_as_it_is():
    weight, _ = layer()
    scale, error = awq([weight], torch.zeros(64), torch.zeros(64, 64), Levels(4, 32))
    assert torch.equal(scale, torch.ones(64)) and error == 0


def test_dead_channels_get_finite_scales():
    weight, inputs = layer(dead=4)
    weight[:, :32] = 0
    scale, _ = awq([weight], inputs.abs().mean(0), hessian_of(inputs).float(), Levels(4, 32))
    assert scale.isfinite().all() and (scale > 0).all()


def test_what_has_no_scale_is_refused():
    weight, inputs = layer()
    with pytest.raises(InputRefused, match="groups of 128"):
        awq([weight], inputs.abs().mean(0), hessian_of(inputs), Levels(4, 128))
    with pytest.raises(InputRefused, match="reads 64 channels"):
        awq([weight], torch.ones(3), hessian_of(inputs), Levels(4, 32))
