import pytest
import torch
from layers import layer

from fxc.calibrate.smooth import smooth
from fxc.errors import InputRefused


def test_it_is_the_formula_over_all_weights_that_read_the_activation():
    one, inputs = layer()
    two, _ = layer(rows=3, seed=1)
    x = inputs.double().abs().amax(0)
    w = torch.cat([one, two]).double().abs().amax(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = smooth([one, two], inputs.abs().amax(0), alpha)
        torch.testing.assert_close(found.double(), x**alpha / w ** (1 - alpha), rtol=1e-5, atol=0)


def test_half_and_half_gives_activation_and_weight_the_same_range():
    weight, inputs = layer()
    scale = smooth([weight], inputs.abs().amax(0))
    torch.testing.assert_close((inputs / scale).abs().amax(0), (weight * scale).abs().amax(0))


def test_outliers_move_into_the_weight():
    weight, inputs = layer()
    inputs[:, 7] *= 100
    scale = smooth([weight], inputs.abs().amax(0))

    def error(x, w):
        step_x, step_w = x.abs().amax() / 127, w.abs().amax(1, keepdim=True) / 127
        return ((x / step_x).round() * step_x @ ((w / step_w).round() * step_w).t() - inputs @ weight.t()).square().mean()

    assert error(inputs / scale, weight * scale) < 0.2 * error(inputs, weight)


def test_channels_that_nothing_reaches_or_reads_stay():
    weight, inputs = layer(dead=2)
    weight[:, 5] = 0
    scale = smooth([weight], inputs.abs().amax(0))
    assert scale[[0, 1, 5]].tolist() == [1, 1, 1]
    assert scale.isfinite().all() and (scale > 0).all()
    assert torch.equal(smooth([weight], torch.zeros(64)), torch.ones(64))


def test_what_has_no_scale_is_refused():
    with pytest.raises(InputRefused, match="alpha=2"):
        smooth([torch.ones(2, 4)], torch.ones(4), 2)
    with pytest.raises(InputRefused, match="reads 4 channels"):
        smooth([torch.ones(2, 4)], torch.ones(5))
    with pytest.raises(InputRefused, match="NaN or Inf"):
        smooth([torch.ones(2, 4)], torch.full((4,), torch.inf))
