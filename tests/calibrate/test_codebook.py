import pytest
import torch

from fxc.calibrate.codebook import clustered


def naive(weight, count):
    """Lloyd's algorithm in float64, number by number."""
    values = weight[weight != 0].double()
    centroids = torch.linspace(values.min(), values.max(), count, dtype=torch.double)
    for _ in range(300):
        nearest = (values[:, None] - centroids).abs().argmin(1)
        means = [values[nearest == at].mean() if (nearest == at).any() else centroids[at] for at in range(count)]
        if torch.equal(torch.stack(means), centroids):
            break
        centroids = torch.stack(means)
    made = torch.zeros_like(weight)
    made[weight != 0] = centroids[(values[:, None] - centroids).abs().argmin(1)].to(weight.dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_k_means_of_what_is_not_zero(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 5, 3, generator=generator) * (torch.rand(20, 5, 3, generator=generator) < 0.6)
    weight = weight.to(dtype)
    found = clustered(weight, 16)
    torch.testing.assert_close(found, naive(weight, 16))
    assert torch.equal(found == 0, weight == 0) and found.dtype == dtype
    assert len(found[found != 0].unique()) <= 16


def test_few_values_stay_and_nothing_is_nothing():
    few = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    assert torch.equal(clustered(few, 16), few)
    assert torch.equal(clustered(torch.zeros(3, 3), 16), torch.zeros(3, 3))
    assert torch.equal(clustered(torch.full((3, 3), 2.0), 16), torch.full((3, 3), 2.0))


def test_more_centroids_are_nearer():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    errors = [(clustered(weight, count) - weight).square().mean().item() for count in (16, 32, 64, 256)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3
