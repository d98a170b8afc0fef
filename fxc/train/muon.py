"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon): the step of a matrix is its momentum with all singular
values made about 1, so that no direction of what a layer gives waits for the others.

torch.optim.Muon takes matrices alone and computes in bfloat16, which some CPUs only emulate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fxc.ir.program import users_of
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR
from fxc.train.schedules import weights
from fxc.train.trainable import Trainable

MOMENTUM = 0.95
# Of the Newton-Schulz iteration that brings singular values near 1 soonest, and how often it is done.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
# The root mean square of AdamW's steps, as shares of the rate: with it one rate and decay serve both (Liu et al., "Muon is
# scalable for LLM training", arXiv 2502.16982).
TYPICAL = 0.2


def matrices(student: Trainable) -> list[str]:
    """What Muon is for of `student.named()`: float weights of linear layers. Not tables, nor layers that give a result, whose
    rows are of one class each; nor numbers at places of a matrix, levels, or convolutions."""
    program, results = student.program, set(student.program.results)

    def is_inside(user: fx.Node) -> bool:
        return user.target in (LINEAR, GROUPED_LINEAR) and results.isdisjoint((user, *user.users))

    return [f"{name}:weight" for name in weights(student) if all(map(is_inside, users_of(program, name)))]


class Muon(torch.optim.Optimizer):
    """Of weights [N, K], and of experts [E, N, K] each its own. The decay is of weights, as in AdamW. dtype: what the
    iteration computes in."""

    def __init__(
        self, params: Iterable[dict], lr: float, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kept = self.state[weight]
                momentum = kept.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                matrix = weight.grad.lerp(momentum, MOMENTUM)
                size = TYPICAL * math.sqrt(max(matrix.shape[-2:]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonal(matrix.to(self.dtype)).to(weight.dtype), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of matrices U S V^T [..., N, K], about: singular values lie between 0.7 and 1.2; those that are nothing stay so."""
    turned = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = turned / turned.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if turned is not matrix else x
