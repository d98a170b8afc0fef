import pytest
import torch
from layers import hessian_of, layer, output_loss

from fxc.calibrate.masks import keep_n_of_m, keep_share, keep_share_of_pieces, pruned
from fxc.errors import InputRefused


def test_n_of_m_keeps_the_highest_of_each_group():
    scores = torch.tensor([[1.0, 4, 2, 3, 9, 8, 7, 6]])
    assert keep_n_of_m(scores).tolist() == [[False, True, False, True, True, True, False, False]]
    assert keep_n_of_m(scores, 1, 4).tolist() == [[False, True, False, False, True, False, False, False]]
    assert keep_n_of_m(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]
    with pytest.raises(InputRefused, match="2 of 4 cannot be kept in rows of 6"):
        keep_n_of_m(torch.ones(2, 6))
    with pytest.raises(InputRefused, match="0 of 4"):
        keep_n_of_m(scores, 0, 4)


def test_a_share_is_of_each_row_or_of_the_whole():
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert keep_share(scores, 0.5, by_row=True).tolist() == [[False, False, True, True]] * 2
    assert keep_share(scores, 0.5, by_row=False).tolist() == [[False] * 4, [True] * 4]
    assert keep_share(scores, 0.4, by_row=True).sum() == 6
    assert keep_share(scores, 0.0, by_row=True).all()
    assert keep_share(torch.zeros(3, 10), 0.9, by_row=True).sum(1).tolist() == [1, 1, 1]
    assert keep_share(torch.zeros(0, 4), 0.5, by_row=True).shape == (0, 4)
    for wrong in (1.0, -0.1):
        with pytest.raises(InputRefused, match="is not from 0 up to 1"):
            keep_share(scores, wrong, by_row=True)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.6, 0.999])
@pytest.mark.parametrize("kind", ["all different", "many alike", "all alike", "infinite"])
def test_of_pieces_the_same_stay_as_of_the_whole(kind, sparsity):
    scores = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)).square()
    if kind == "many alike":
        scores = (scores * 3).round()
    elif kind == "all alike":
        scores = torch.full_like(scores, 0.3)
    elif kind == "infinite":
        scores[scores > 0.5] = float("inf")
    found = torch.cat(list(keep_share_of_pieces(lambda: scores.split(2), sparsity, scores.numel())))
    assert torch.equal(found, keep_share(scores, sparsity, by_row=False))


def test_what_is_pruned_is_zero_and_its_loss_is_told():
    weight, inputs = layer()
    keep = keep_n_of_m(weight.abs())
    made = pruned(weight, keep, hessian_of(inputs))
    assert torch.equal(made.weight, weight * keep) and torch.equal(made.keep, keep)
    assert made.error == pytest.approx(output_loss(weight, weight * keep, inputs), rel=1e-4)
