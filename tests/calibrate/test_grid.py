import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.grid import grid, grid_scales, nearest, nearest_scales, rounded
from fxc.calibrate.levels import Levels
from fxc.errors import InputRefused

KINDS = [
    Levels(bits, group, symmetric)
    for bits, group in ((2, 32), (3, 64), (4, 32), (4, 128), (8, -1))
    for symmetric in (True, False)
]
ids = {"ids": lambda kind: f"{kind.bits}-{kind.group}-{'symmetric' if kind.symmetric else 'asymmetric'}"}


def naive(weight, levels, scale, zero):
    """The nearest level of every number by trying all of them, float64."""
    width = levels.width(weight.shape[1])
    step = scale.double().repeat_interleave(width, 1)[..., None]
    origin = 2 ** (levels.bits - 1) if zero is None else zero.double().repeat_interleave(width, 1)[..., None]
    choices = step * (torch.arange(2**levels.bits, dtype=torch.float64) - origin)
    best = (choices - weight.double()[..., None]).abs().argmin(-1, keepdim=True)
    return choices.gather(-1, best).squeeze(-1)


@pytest.mark.parametrize("levels", KINDS, **ids)
def test_rounding_takes_the_nearest_level(levels):
    weight, inputs = layer(rows=3, columns=128)
    made = nearest(weight, levels, hessian_of(inputs).float())
    assert made.q.dtype == torch.uint8 and made.q.shape == (3, 128) and int(made.q.max()) < 2**levels.bits
    groups = 128 // levels.width(128)
    assert made.scale.shape == (3, groups) and made.scale.dtype == torch.float32
    if levels.symmetric:
        assert made.zero is None
    else:
        assert made.zero.shape == (3, groups) and made.zero.dtype == torch.uint8
    expected = naive(weight, levels, made.scale, made.zero)
    torch.testing.assert_close(made.dense().double(), expected, rtol=1e-5, atol=1e-6)
    assert made.error == pytest.approx(output_loss(weight, expected, inputs), rel=1e-3)


def test_the_largest_number_is_the_lowest_level_and_exact():
    weight = torch.tensor([[3.0] + [0.5] * 31 + [-7.0] + [1.0] * 31])
    made = nearest(weight, Levels(4, 32))
    assert made.scale.tolist() == [[-3 / 8, 7 / 8]]
    assert made.q[0, 0] == made.q[0, 32] == 0
    assert made.dense()[0, 0] == 3 and made.dense()[0, 32] == -7
    without = nearest(weight, Levels(4, 32, full_range=False))
    torch.testing.assert_close(without.scale, torch.tensor([[3 / 7.5, 7 / 7.5]]))


@pytest.mark.parametrize("levels", KINDS, **ids)
def test_the_search_is_never_worse_and_mostly_better(levels):
    weight, inputs = layer(rows=16, columns=128)
    importance = inputs.square().mean(0)
    plain, found = (rounded(weight, levels, each, importance) for each in (
        nearest_scales(weight, levels), grid_scales(weight, levels, importance)
    ))  # fmt: skip
    width = levels.width(128)

    def errors(made):
        return ((made.dense() - weight).square() * importance).unflatten(1, (-1, width)).sum(-1)

    assert (errors(found) <= errors(plain) * (1 + 1e-5)).all()
    assert found.error < 0.97 * plain.error
    assert grid(weight, levels, importance).error == found.error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_nearly_the_best_scale_of_all(bits):
    """Against 4,000 scales in float64."""
    weight, inputs = layer(rows=4, columns=32)
    importance = inputs.square().mean(0).double()
    levels = Levels(bits, 32)
    found = rounded(weight, levels, grid_scales(weight, levels, importance), importance.float())
    for row, made in zip(weight.double(), found.dense().double(), strict=True):
        step = torch.linspace(-1.5, 1.5, 4_000, dtype=torch.float64)[:, None] * row.abs().max() / 2 ** (bits - 1)
        step = step[step.squeeze(1) != 0]
        tried = (row / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        best = ((tried - row).square() * importance).sum(1).min()
        assert ((made - row).square() * importance).sum() <= 1.02 * best


def test_scales_are_divided_by_as_they_are_kept():
    weight, inputs = layer(columns=64)
    levels = Levels(4, 32, kept=torch.bfloat16)
    made = grid(weight, levels, inputs.square().mean(0))
    assert made.scale.dtype == torch.bfloat16
    expected = naive(weight, levels, made.scale, None)
    torch.testing.assert_close(made.dense().double(), expected, rtol=1e-5, atol=1e-6)


def test_importance_moves_the_scale():
    """Where only small numbers are read, the large one is cut off."""
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([3.0])])[None]
    importance = torch.ones(32)
    importance[-1] = 0
    plain, found = nearest(weight, Levels(4, 32)), grid(weight, Levels(4, 32), importance)
    assert (found.dense() - weight)[0, :31].square().sum() < 0.2 * (plain.dense() - weight)[0, :31].square().sum()


@pytest.mark.parametrize("levels", KINDS, **ids)
def test_zeros_stay_zero_and_dead_inputs_round_as_without_data(levels):
    weight, inputs = layer(rows=4, columns=128)
    weight[1] = 0
    weight[2, :32] = 1e-38
    importance = inputs.square().mean(0)
    importance[:128] = 0
    made = grid(weight, levels, importance)
    assert not made.dense()[1].any()
    assert made.dense().isfinite().all() and made.error == 0
    assert torch.equal(made.q, grid(weight, levels, torch.ones(128)).q)


def test_no_rows_give_no_rows():
    made = grid(torch.empty(0, 64), Levels(4, 32), torch.ones(64))
    assert made.q.shape == (0, 64) and made.scale.shape == (0, 2) and made.error == 0


def test_what_cannot_be_quantized_is_refused():
    weight = torch.ones(2, 96)
    with pytest.raises(InputRefused, match="groups of 64 do not divide rows of 96"):
        nearest(weight, Levels(4, 64))
    with pytest.raises(InputRefused, match="groups of 0 do not divide"):
        nearest(torch.ones(2, 0), Levels(4, -1))
    with pytest.raises(InputRefused, match="NaN or Inf"):
        nearest(weight * torch.inf, Levels(4, 32))
    with pytest.raises(InputRefused, match="floating-point matrix"):
        nearest(torch.ones(2, 32, dtype=torch.int32), Levels(4, 32))
    with pytest.raises(InputRefused, match="reads 96 channels"):
        grid(weight, Levels(4, 32), torch.ones(95))
    with pytest.raises(InputRefused, match=r"statistics.*NaN"):
        grid(weight, Levels(4, 32), torch.full((96,), torch.nan))
    with pytest.raises(InputRefused, match="5 bits"):
        Levels(5, 32)
    with pytest.raises(InputRefused, match="groups of 48"):
        Levels(4, 48)
