"""Attention in training is torch's, to what bfloat16 can tell, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from families import build
from formats import normal

import fxc
from fxc.train import attention as module
from fxc.train.attention import SDPA, attention
from fxc.train.trainable import Trainable

B, H, N, M, D = 3, 4, 17, 23, 8
MASK = torch.ones(N, M, dtype=torch.bool).tril(M - N)[None, None]
MASKS = {
    "none": {},
    "bool": {"attn_mask": MASK.expand(B, 1, N, M)},
    "float": {"attn_mask": normal(B, H, N, M, seed=9).bfloat16().float()},
    "least": {"attn_mask": torch.zeros(B, 1, N, M).masked_fill(~MASK, torch.finfo(torch.float32).min)},
    "of one sample": {"attn_mask": MASK},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.2},
}


def given(dtype: torch.dtype, keys: int = H) -> list[torch.Tensor]:
    shapes = ((B, H, N, D), (B, keys, M, D), (B, keys, M, D))
    return [normal(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def results(function, tensors, **options) -> list[torch.Tensor]:
    made = function(*tensors, **options)
    return [made.detach(), *torch.autograd.grad(made, tensors, normal(*made.shape, seed=5).to(made.dtype))]


@pytest.mark.parametrize("part", [1, 2 * N * M, 1 << 19])
@pytest.mark.parametrize("mask", MASKS)
def test_in_bfloat16_it_is_that_of_torch(monkeypatch, mask, part):
    monkeypatch.setattr(module, "PART", part)
    tensors = given(torch.bfloat16)
    exact = results(SDPA, [each.detach().float().requires_grad_() for each in tensors], **MASKS[mask])
    for mine, aim in zip(results(attention, tensors, **MASKS[mask]), exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine.float() - aim).norm() / aim.norm()) < 0.02


def test_heads_may_share_keys():
    tensors = given(torch.bfloat16, keys=2)
    exact = results(SDPA, [each.detach().float().requires_grad_() for each in tensors], enable_gqa=True)
    for mine, aim in zip(results(attention, tensors, enable_gqa=True), exact, strict=True):
        assert float((mine.float() - aim).norm() / aim.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_other_types_it_is_torch_s_own(dtype):
    for mine, aim in zip(results(attention, given(dtype)), results(SDPA, given(dtype)), strict=True):
        assert torch.equal(mine, aim)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, H, N, D), (B, H, M, D), (B, H, M, D)), {}),
        (((B, H, N, D), (1, H, M, D), (1, H, M, D)), {}),
        (((B, H, 0, D), (B, H, M, D), (B, H, M, D)), {}),
        (((0, H, N, D), (0, H, M, D), (0, H, M, D)), {}),
        (((B, H, N, D), (B, H, M, D), (B, H, M, D)), {"attn_mask": 100 * normal(B, 1, N, M, seed=7)}),
    ],
)
def test_what_is_left_to_torch(shapes, options):
    tensors = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    with torch.autocast("cpu", torch.bfloat16):
        made, aim = (function(*tensors, **options) for function in (attention, SDPA))
    assert made.shape == aim.shape and torch.equal(made, aim)


def test_a_query_that_sees_nothing_gives_what_torch_gives():
    mask = MASK.clone()
    mask[..., 3, :] = False
    tensors = given(torch.bfloat16)
    assert torch.equal(attention(*tensors, mask), SDPA(*tensors, mask))


def test_autocast_chooses_the_type_and_nothing_of_scores_is_kept(monkeypatch):
    kept = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        made = attention(*given(torch.float32), **MASKS["bool"])
    assert made.dtype == torch.bfloat16
    assert max(each.numel() for each in kept if each.is_floating_point() and each.requires_grad) <= B * H * M * D


def test_a_program_in_training_uses_it():
    model, example = build("qwen2")
    student = Trainable(fxc.optimize(model, example, passes="").program)
    targets = [node.target for node in student.module.graph.nodes]
    assert attention in targets and SDPA not in targets
