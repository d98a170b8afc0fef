"""Weights in training, divided among processes: each holds a part of a weight, of its gradient, its moments and its best state,
and all gather it where it is read (ZeRO, Rajbhandari et al., arXiv 1910.02054; FSDP, Zhao et al., arXiv 2304.11277).

A weight is gathered when its latent is called. With checkpointing of activations that is in its block, which is run again for
its gradient, so that of gathered weights those of one block are in memory; without it, all of them. Every process has to call
the same latents equally often, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxc import ranks
from fxc.train.reparametrize import holder_of, kind_of, reparametrize, undo
from fxc.train.trainable import Trainable

# What has fewer numbers is in every process: a message would cost more.
LEAST = 1 << 12


class Gathered(nn.Module):
    """A weight of the parts that the processes have: of its numbers, in order, as many for each, the last ones zeros."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, part: Tensor) -> Tensor:
        return _Gather.apply(part)[: self.shape.numel()].view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """This process's part of a weight."""
        size = -(-weight.numel() // ranks.count())
        padded = nn.functional.pad(weight.detach().flatten(), (0, size * ranks.count() - weight.numel()))
        return padded[ranks.number() * size :][:size].clone()


class _Gather(torch.autograd.Function):
    """All parts one after another; backward this process's part of the sum of all gradients."""

    @staticmethod
    def forward(ctx: object, part: Tensor) -> Tensor:
        return ranks.gathered(part)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return ranks.added_part(gradient)


def shard(student: Trainable) -> dict[str, str]:
    """From now on each process trains its part of large weights, in place: their names, with what kind they are of. Nothing
    where there is but one process."""
    sharded = {}
    for name, latent in student.latents.items() if ranks.count() > 1 else ():
        weight = holder_of(latent)[0].weight
        if not weight.requires_grad or weight.numel() < LEAST:
            continue
        sharded[name] = kind_of(latent)
        reparametrize(latent, Gathered(weight.shape), {"original": sharded[name]}, unsafe=True)
    return sharded


def gather(student: Trainable, sharded: dict[str, str]) -> None:
    """Let every process have the weights of these names again."""
    for name, kind in sharded.items():
        undo(student.latents[name], kind)


def parts_of(student: Trainable, sharded: dict[str, str]) -> set[str]:
    """The parameters of which each process has a part, by name (`Trainable.named`)."""
    inner = {name: holder_of(student.latents[name])[1] for name in sharded}
    return {f"{name}:{prefix}parametrizations.weight.original" for name, prefix in inner.items()}
