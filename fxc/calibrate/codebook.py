"""Numbers that share values: k-means in one dimension, as Deep Compression (Han et al., arXiv 1510.00149) shares weights.

Zeros stay zero, and take no part. Centroids begin evenly between the smallest and the largest number, which keeps the few large
ones (the paper's linear initialization, the best of its three), and are the means of what is nearest to them until none moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 300


def clustered(weight: Tensor, count: int) -> Tensor:
    """`weight` of any shape, each number that is not zero replaced by the nearest of `count` centroids, in its dtype."""
    used = weight != 0
    values, order = weight[used].double().sort()
    if not len(values):
        return weight
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    centroids = torch.linspace(float(values[0]), float(values[-1]), count, dtype=torch.double, device=weight.device)
    for _ in range(STEPS):
        ends = _ends(values, centroids)
        sizes = ends.diff()
        means = sums[ends].diff() / sizes
        # A centroid that no number is nearest to stays where it is.
        moved = torch.where(sizes > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    stored = centroids.to(weight.dtype)
    nearest = torch.empty_like(values, dtype=weight.dtype)
    nearest[order] = stored.repeat_interleave(_ends(values, centroids).diff())
    made = torch.zeros_like(weight)
    made[used] = nearest
    return made


def _ends(values: Tensor, centroids: Tensor) -> Tensor:
    """int64 [count + 1]: where in the sorted `values` those begin that are nearest to each sorted centroid, and the end."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    inner = torch.searchsorted(values, middles)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])
