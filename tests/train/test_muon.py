"""Steps whose singular values are alike, for the matrices inside a network."""

from __future__ import annotations

import pytest
import torch
from families import build
from formats import normal
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.passes.base import parse_passes
from fxc.train.muon import MOMENTUM, TYPICAL, Muon, matrices, orthogonal
from fxc.train.trainable import Trainable


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (3, 8, 4)])
def test_singular_values_come_near_one(shape):
    matrix = normal(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix)
    assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.4
    assert torch.nn.functional.cosine_similarity(made.flatten(), (u @ v).flatten(), 0) > 0.97


def test_no_gradient_is_no_step():
    assert not orthogonal(torch.zeros(4, 6)).any()


def test_its_steps_are_those_of_torch():
    """torch's computes in bfloat16."""
    one, other = (nn.Parameter(normal(12, 20, seed=1)) for _ in range(2))
    mine = Muon([{"params": [one]}], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        before = other.detach().clone()
        one.grad, other.grad = normal(12, 20, seed=step), normal(12, 20, seed=step)
        mine.step()
        theirs.step()
        assert (one - other).norm() < 0.03 * (step + 1) * (other - before).norm()


def test_an_expert_s_step_is_its_own():
    together = nn.Parameter(normal(3, 6, 8))
    apart = [nn.Parameter(each.clone()) for each in together.detach()]
    together.grad = normal(3, 6, 8, seed=2)
    for own, grad in zip(apart, together.grad, strict=True):
        own.grad = grad
        Muon([{"params": [own]}], lr=0.1).step()
    Muon([{"params": [together]}], lr=0.1).step()
    torch.testing.assert_close(together.detach(), torch.stack([each.detach() for each in apart]))


def test_a_step_is_as_large_as_its_rate_says():
    weight = nn.Parameter(torch.zeros(16, 64))
    weight.grad = normal(16, 64)
    Muon([{"params": [weight]}], lr=0.5).step()
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.5 * TYPICAL, rel=0.25)


def test_it_is_for_the_matrices_inside():
    model, example = build("qwen2")
    names = matrices(Trainable(fxc.optimize(model, example, passes="").program))
    assert "model.layers.0.self_attn.q_proj.weight:weight" in names
    assert not any("embed" in name or "norm" in name or "bias" in name or "lm_head" in name for name in names)
    packed = Trainable(fxc.optimize(model, example, passes="int4:group=32").program)
    assert set(matrices(packed)) < set(names)


@pytest.mark.parametrize("more", ["lora=4", "shard=true"])
def test_parts_of_matrices_go_without(more):
    with pytest.raises(UsageError, match="Muon turns whole matrices"):
        parse_passes(f"recover:optimizer=muon:{more}")
    assert parse_passes(f"recover:{more}")[0].plan(0).muon == 0 < parse_passes("recover")[0].plan(0).muon
