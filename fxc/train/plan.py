"""How to train, in numbers: how long, on how much at a time, at which rate when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fxc.errors import UsageError
from fxc.train.precision import Precision

Kind = Literal["weight", "vector", "scale"]
"""What a parameter is (`Latent.kind`)."""
# The share of the largest rate that the first step has, and that no later one falls below.
FIRST, LEAST = 0.05, 0.01


@dataclass(frozen=True)
class Plan:
    """How to train.

    steps: optimizer steps; minutes: if given, so long instead, and the schedule follows the time; batch: samples a step;
    accumulate: in so many parts their gradients are computed, one after another, and added up, which takes less memory;
    rate: the largest learning rate of AdamW; muon: that of matrices for which a loop is given Muon, as a factor of it, 0: AdamW
    for these too; vector_rate, scale_rate: of biases and gains, and of scales, as factors of it;
    weight_decay: of weights, not of vectors and scales; schedule: cosine, linear or constant, after `warmup` (a share of all
    steps), down to a hundredth; max_norm: the largest norm of the gradient; precision: what products run in, by autocast, while
    master weights are float32; looks: so many times the held-out samples are looked at; patience: training ends after so many
    looks that were no better than the best, 0: never before its time; seed: of the order of samples.
    Raises UsageError for numbers that make no sense.
    """

    steps: int = 400
    minutes: float = 0.0
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    max_norm: float = 1.0
    precision: Precision = "float32"
    looks: int = 10
    seed: int = 0
    accumulate: int = 1
    vector_rate: float = 1.0
    scale_rate: float = 1.0
    muon: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "looks", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not at least 1", where=name)
        for name in ("minutes", "patience", "weight_decay", "vector_rate", "scale_rate", "muon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)} is not 0 or more", where=name)
        for name in ("rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} is not above 0", where=name)
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup={self.warmup} is not a share from 0 up to 1", where="warmup")

    def rate_at(self, done: float) -> float:
        """The share of `rate` when a share of the training is done."""
        if done < self.warmup:
            return max(done / self.warmup, FIRST)
        left = 1 - (done - self.warmup) / (1 - self.warmup)
        if self.schedule == "constant":
            return 1.0
        return max(left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)), LEAST)

    def factor(self, kind: Kind) -> float:
        """What `rate` is multiplied by for a kind."""
        return {"weight": 1.0, "vector": self.vector_rate, "scale": self.scale_rate}[kind]
