"""Learned rounding: levels and scales of all layers of half a block are trained together, by what it gives, as in SignRound
(Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516).

    w ~= f s (round(a + v) - zero)        v in -1 .. 1 for each number, f for each group, a + v clamped to the levels

It starts from a weight that is quantized already, with v = 0 and f = 1. For that a is not w / s + zero but the level that is
there, moved towards it by half of the way, at most a quarter of a level: a number between two levels changes to the other more
easily than one that is not. Levels do not depend on f, which is free to fit the scale. (From a weight that is rounded to
nearest, as in the paper, training ended at twice the error that Qronos begins with, on a small language model.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxc.calibrate.levels import Quantized
from fxc.calibrate.reconstruct import Fit, reconstruct
from fxc.calibrate.stream import Passage
from fxc.progress import Track, untracked

STEPS, BATCH = 100, 8
# Per step, at the beginning: v may go by a quarter of a level in all, f by a hundredth.
RATE, FACTOR_RATE = 0.5 / STEPS, 0.02 / STEPS


class Rounding:
    """What can be trained of a weight [N, K] that is quantized: v and factor, float32 by group. Its zeros stay zero."""

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        self.start, self.levels = start, start.levels
        self.width = self.levels.width(weight.shape[1])
        self.scale = start.scale.float().unsqueeze(-1)
        zero = torch.full_like(start.scale, self.levels.middle) if start.zero is None else start.zero
        self.zero = zero.float().unsqueeze(-1)
        codes = start.q.float().unflatten(1, (-1, self.width))
        exact = weight.detach().float().unflatten(1, (-1, self.width)) / self.scale + self.zero
        self.keep = None if bool((weight != 0).all()) else (weight != 0).unflatten(1, (-1, self.width))
        self.about = codes + (exact - codes).clamp(-0.5, 0.5) / 2
        self.v = torch.zeros_like(codes).requires_grad_()
        self.factor = torch.ones_like(self.scale).requires_grad_()

    def dense(self) -> Tensor:
        """The weight, float32 [N, K]; gradients go through rounding as if it were none, and not past the ends."""
        codes = self._clamped(_through(self.about + self.v, torch.round))
        return ((codes - self.zero) * _through(self.scale * self.factor, self.levels.stored)).flatten(1)

    @torch.no_grad()
    def made(self) -> Quantized:
        """As it is now. error: that of the start."""
        codes = self._clamped((self.about + self.v).round())
        scale = self.levels.stored(self.scale * self.factor).squeeze(-1)
        return replace(self.start, q=codes.flatten(1).to(torch.uint8), scale=scale.to(self.levels.kept))

    def _clamped(self, codes: Tensor) -> Tensor:
        codes = codes.clamp(self.levels.least, self.levels.largest)
        return codes if self.keep is None else torch.where(self.keep, codes, self.zero)


class SignSGD(torch.optim.Optimizer):
    """Each number goes by the rate against the sign of its gradient, and stays within `bounds`."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for tensor in (each for each in group["params"] if each.grad is not None):
                tensor.sub_(tensor.grad.sign(), alpha=group["lr"]).clamp_(*group["bounds"])


def learn_rounding(
    passage: Passage,
    roundings: Mapping[str, Rounding],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    track: Track = untracked,
    what: str = "learning to round",
) -> Fit | None:
    """Train the levels and scales of the weights that `roundings` names, constants of `passage.program`, by `reconstruct`."""
    every = list(roundings.values())
    optimizer = SignSGD(
        [
            {"params": [each.v for each in every], "lr": RATE * STEPS / steps, "bounds": (-1.0, 1.0)},
            {"params": [each.factor for each in every], "lr": FACTOR_RATE * STEPS / steps, "bounds": (0.5, 1.5)},
        ]
    )
    weights = passage.program.constants
    made = {name: lambda each=each, to=weights[name].dtype: each.dense().to(to) for name, each in roundings.items()}
    return reconstruct(passage, made, optimizer, steps=steps, batch=batch, seed=seed, track=track, what=what)


def _through(value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(value), with the gradient of value."""
    return value + (function(value) - value).detach()
