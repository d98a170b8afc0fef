"""Divergences beside those of torch, with their gradients."""

from __future__ import annotations

import pytest
import torch
from formats import normal
from torch.nn.functional import kl_div

from fxc.train import divergence as module
from fxc.train.divergence import divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (2, 6, 7)])
def test_it_is_that_of_torch(shape, temperature, dtype, monkeypatch):
    monkeypatch.setattr(module, "PART", 16)  # two rows at a time, of some shapes one at last
    mine, aim = (normal(*shape, seed=seed).to(dtype).requires_grad_(seed == 1) for seed in (1, 2))
    logs = ((each.float() / temperature).log_softmax(-1) for each in (mine, aim))
    expected = kl_div(*logs, log_target=True, reduction="none").sum(-1)
    made = divergence(mine, aim, temperature)
    torch.testing.assert_close(made, expected)
    weights = normal(*expected.shape, seed=3)
    grads = [torch.autograd.grad((each * weights).sum(), mine)[0] for each in (made, expected)]
    assert grads[0].dtype == dtype and grads[1].any()
    torch.testing.assert_close(*grads)


def test_a_class_that_cannot_be_counts_as_nothing():
    mine, aim = (normal(4, 6, seed=seed) for seed in (1, 2))
    mine[:, 2] = aim[:, 2] = float("-inf")
    aim[0, 4] = float("-inf")
    mine.requires_grad_()
    made = divergence(mine, aim)
    p, logs = aim.softmax(-1), (aim.log_softmax(-1), mine.log_softmax(-1))
    torch.testing.assert_close(made, torch.where(p > 0, p * (logs[0] - logs[1]), 0.0).sum(-1))
    made.sum().backward()
    torch.testing.assert_close(mine.grad, (mine.softmax(-1) - p).detach())


def test_nothing_is_kept_where_nothing_is_trained():
    with torch.no_grad():
        assert divergence(normal(3, 5), normal(3, 5, seed=1)).grad_fn is None
