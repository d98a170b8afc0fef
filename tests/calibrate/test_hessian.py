import pytest
import torch
from layers import hessian_of, layer

from fxc.calibrate.hessian import Hessian, Squares
from fxc.errors import InputRefused


def test_batches_of_any_size_add_up_to_the_whole():
    _, x = layer(samples=300)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    both, squares = Hessian(64, cross=True), Squares(64)
    for begin, end in ((0, 1), (1, 1), (1, 7), (7, 300)):
        both.add(x[begin:end], y[begin:end])
        squares.add(x[begin:end])
    assert both.rows == squares.rows == 300
    whole = hessian_of(x)
    torch.testing.assert_close(both.mean.double(), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.cross.double(), 2 * x.double().t() @ y.double() / 300, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares.mean.double(), x.double().square().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.size.double(), x.double().abs().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(squares.largest, x.abs().amax(0))


def test_inputs_of_any_rank_and_dtype_are_rows():
    _, x = layer(samples=24)
    half = x.to(torch.bfloat16)
    flat, deep = Hessian(64), Hessian(64)
    flat.add(half)
    deep.add(half.view(2, 3, 4, 64))
    assert deep.rows == 24
    assert torch.equal(flat.mean, deep.mean)
    torch.testing.assert_close(flat.mean.double(), hessian_of(half), rtol=1e-4, atol=1e-4)


def test_float64_is_kept_where_asked():
    _, x = layer()
    exact = Hessian(64, dtype=torch.float64)
    for part in x.split(7):
        exact.add(part)
    torch.testing.assert_close(exact.mean, hessian_of(x), rtol=1e-12, atol=1e-12)


def test_channels_that_nothing_reached_are_found():
    _, x = layer(dead=3)
    hessian, squares = Hessian(64), Squares(64)
    assert hessian.dead.all() and squares.dead.all()
    hessian.add(x)
    squares.add(x)
    assert hessian.dead.tolist() == squares.dead.tolist() == [True] * 3 + [False] * 61


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_inputs_that_are_not_finite_are_refused_and_not_counted(bad):
    _, x = layer(samples=4)
    wrong = x.clone()
    wrong[2, 5] = bad
    for statistics in (Hessian(64), Squares(64)):
        statistics.add(x)
        before = statistics.mean.clone()
        with pytest.raises(InputRefused, match="1 of its 64 channels"):
            statistics.add(wrong)
        assert torch.equal(statistics.mean, before) and statistics.rows == 4
    both = Hessian(64, cross=True)
    with pytest.raises(InputRefused, match="NaN or Inf"):
        both.add(x, wrong)
    assert not both.cross.any()


def test_what_is_not_this_layers_input_is_refused():
    with pytest.raises(InputRefused, match="reads 64 channels"):
        Hessian(64).add(torch.ones(3, 63))
    with pytest.raises(InputRefused, match="reads 64 channels"):
        Squares(64).add(torch.ones(3, 64, dtype=torch.int64))
    with pytest.raises(InputRefused, match="two streams"):
        Hessian(64, cross=True).add(torch.ones(3, 64))
    with pytest.raises(InputRefused, match="two streams"):
        Hessian(64).add(torch.ones(3, 64), torch.ones(3, 64))
    with pytest.raises(InputRefused, match="differ in rows"):
        Hessian(64, cross=True).add(torch.ones(3, 64), torch.ones(2, 64))
