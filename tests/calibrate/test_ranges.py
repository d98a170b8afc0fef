"""The range of what a layer reads, and the levels that cover it."""

import pytest
import torch

from fxc.calibrate.ranges import CUT, HALF, Range
from fxc.errors import InputRefused

HEAVY = torch.distributions.StudentT(3.0)


def of(*batches: torch.Tensor) -> Range:
    found = Range()
    for batch in batches:
        found.add(batch)
    return found


def heavy(count: int = 20000) -> torch.Tensor:
    torch.manual_seed(0)
    return HEAVY.sample((count // 4, 4))


def lost(x: torch.Tensor, scale: float, zero: int) -> float:
    """By its meaning, number by number: what is cut off counts CUT times."""
    inside = x.double().clamp(-zero * scale, (255 - zero) * scale)
    q = (inside / scale).round().add(zero)
    return (((q - zero) * scale - inside).square() + CUT * (inside - x.double()).square()).sum().item()


def test_the_order_of_samples_does_not_matter_and_ends_are_exact():
    small, large = torch.linspace(-1e-4, 3e-4, 50), torch.linspace(-7.0, 900.0, 1000)
    one, other = of(small, large), of(large, small)
    assert torch.equal(one.counts, other.counts) and one.width == other.width and one.counts.sum() == 1050
    assert (one.low, one.high) == (-7.0, 900.0) and one.width * HALF >= 900.0 > one.width * HALF / 2
    assert one.rows == 2 and Range().rows == 0


def test_minmax_covers_everything_and_zero_is_a_level():
    x = heavy()
    scale, zero = of(x).scale_and_zero("minmax")
    assert scale == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
    assert (x / scale).round().add(zero).min() >= -1 and (x / scale).round().add(zero).max() <= 256
    assert of(x.abs()).scale_and_zero("minmax")[1] == 0, "what is never negative has all levels above zero"
    assert of(-x.abs()).scale_and_zero("minmax")[1] == 255
    assert of(x.abs() + 5).low == 0.0


def test_percentile_leaves_out_one_in_ten_thousand():
    x = torch.arange(-50000.0, 50000.0)
    low, high = of(x).ends_by("percentile")
    assert low == pytest.approx(-49995, abs=16) and high == pytest.approx(49995, abs=16)
    assert of(x.abs()).ends_by("percentile")[0] == 0.0


@pytest.mark.parametrize(
    "made, cuts",
    [
        (lambda x: x, True),
        (lambda x: x.clamp(min=0), False),
        (lambda x: torch.cat([x, x.new_full((1, 4), 300.0)]), True),
    ],
)
def test_mse_loses_least_of_the_three_by_the_numbers_themselves(made, cuts):
    x = made(heavy())
    found = of(*x.split(1000))
    losses = {observer: lost(x, *found.scale_and_zero(observer)) for observer in ("minmax", "percentile", "mse")}
    assert losses["mse"] <= min(losses.values()) * 1.005 and (losses["mse"] < losses["minmax"]) == cuts
    # Of all ranges that a search over the numbers themselves tries, none is much better.
    ends = [(float(x.min()) * a / 20, float(x.max()) * b / 20) for a in range(1, 21) for b in range(1, 21)]
    best = min(lost(x, (high - low) / 255, round(-low / ((high - low) / 255))) for low, high in ends)
    assert losses["mse"] < 1.05 * best
    scale, zero = found.scale_and_zero("mse")
    rounded = (x.double() / scale).round().add(zero).clamp(0, 255).sub(zero).mul(scale)
    assert found.error(scale, zero) == pytest.approx(((rounded - x).norm() / x.norm()).item() ** 2, rel=0.05)


def test_what_is_always_zero_has_a_scale():
    for observer in ("minmax", "percentile", "mse"):
        found = of(torch.zeros(3, 4))
        assert found.scale_and_zero(observer) == (1.0, 0) and found.error(1.0, 0) == 0.0
        assert of(torch.full((2, 2), 1e-44)).scale_and_zero(observer) == (1.0, 0)


def test_what_has_no_range_is_refused():
    with pytest.raises(InputRefused, match="reads NaN or Inf"):
        of(torch.tensor([1.0, float("nan")]))
    with pytest.raises(InputRefused, match="reads NaN or Inf"):
        of(torch.tensor([1.0, float("-inf")]))
    with pytest.raises(InputRefused, match="integers"):
        of(torch.arange(3))
    empty = of(torch.zeros(0, 4))
    assert empty.rows == 0 and empty.scale_and_zero("mse") == (1.0, 0)
