import torch

from fxc.calibrate.ranking import Ranking, relative


def test_a_score_is_a_share_of_those_that_are_not_smaller():
    squares = torch.tensor([[4.0, 1.0], [0.0, 5.0]])
    torch.testing.assert_close(relative(squares), torch.tensor([[4 / 9, 1 / 10], [0.0, 1.0]]))
    assert not relative(torch.zeros(3)).any()


def test_shares_are_those_of_one_ranking_of_all_numbers():
    generator = torch.Generator().manual_seed(0)
    layers = {name: torch.rand(40, 50, generator=generator).pow(power) for name, power in (("a", 1), ("b", 3), ("c", 9))}
    ranking = Ranking()
    for name, scores in layers.items():
        for part in scores.split(10):
            ranking.add(name, part)
    shares = ranking.shares(0.6)
    edge = torch.cat([each.flatten() for each in layers.values()]).double().quantile(0.6)
    for name, scores in layers.items():
        assert abs(shares[name] - (scores < edge).double().mean()) < 5e-3, name
    assert abs(sum(shares.values()) / 3 - 0.6) < 1e-9, "together exactly what was asked for"
    assert shares["a"] < shares["b"] < shares["c"]


def test_no_layer_goes_whole():
    ranking = Ranking()
    ranking.add("dead", torch.zeros(10))
    ranking.add("alive", torch.ones(90))
    assert ranking.shares(0.5)["dead"] == 0.9
