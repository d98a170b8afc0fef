"""The training loop: steps over batches, the rate by a schedule, and the best state by held-out samples kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fxc.errors import UsageError
from fxc.progress import Track, untracked

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Plan:
    """How to train.

    steps: optimizer steps; minutes: if given, so long instead, and the schedule follows the time; batch: samples a step;
    rate: the largest learning rate of AdamW, weight_decay as its; schedule: cosine, linear or constant, after `warmup` (a share
    of all steps), down to a hundredth; clip: the largest norm of the gradient; precision: what products run in, by autocast,
    while master weights are float32; looks: so many times the held-out samples are looked at; seed: of the order of samples.
    """

    steps: int = 400
    minutes: float = 0.0
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    clip: float = 1.0
    precision: Precision = "float32"
    looks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "looks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not at least 1", where=name)
        if self.rate <= 0 or self.minutes < 0 or self.clip <= 0:
            raise UsageError("the learning rate and the norm to clip at are above 0, and minutes not below", where="rate")

    def rate_at(self, done: float) -> float:
        """The share of `rate` when a share of the training is done."""
        if done < self.warmup:
            return max(done / self.warmup, 0.05)
        left = 1 - (done - self.warmup) / max(1 - self.warmup, 1e-9)
        if self.schedule == "constant":
            return 1.0
        share = left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return max(share, 0.01)


@dataclass
class Fit:
    """What training did. before, after: the loss on held-out samples, equal where no state was better than the first; curve:
    (step, seconds, the mean loss of the batches since the last point, the loss on held-out samples)."""

    before: float
    after: float
    steps: int
    seconds: float
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)


def train(
    parameters: Mapping[str, nn.Parameter],
    lost: Callable[[int], Iterable[Tensor]],
    judged: Callable[[], float],
    plan: Plan,
    rates: Mapping[str, float] | None = None,
    before_step: Callable[[float], None] | None = None,
    settled: float = 0.0,
    first_counts: bool = True,
    state: Sequence[Tensor] = (),
    track: Track = untracked,
    what: str = "training",
) -> Fit:
    """Train `parameters` in place and leave them as they were best.

    lost: of a step, its loss in parts that add up, each with its graph, one after another; judged: the loss on held-out
    samples;
    rates: name -> what the rate is multiplied by, 1 where it is not named; before_step: is told the share that is done (masks
    that grow, rounding that begins); settled: from which share on what is trained is of the kind that is wanted: a state before
    counts as none, but for the first; state: what else changes with the parameters, and is kept with them.
    """
    rates = rates or {}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(rates.get(name, 1.0), []).append(parameter.requires_grad_())
    optimizer = torch.optim.AdamW(
        [{"params": some, "factor": factor} for factor, some in groups.items()],
        lr=plan.rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", enabled=plan.precision == "float16")
    began = time.monotonic()
    fit = Fit(best := judged(), best, 0, 0.0)
    best = best if first_counts else math.inf
    every = [*parameters.values(), *state]
    kept = _copies(every)
    losses: list[float] = []
    looked = 0
    steps = range(plan.steps) if not plan.minutes else iter(int, 1)
    for step in track(steps, what, plan.steps):
        done = (time.monotonic() - began) / (60 * plan.minutes) if plan.minutes else step / plan.steps
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * group["factor"] * plan.rate_at(done)
        if before_step is not None:
            before_step(done)
        optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for part in lost(fit.steps):
                scaler.scale(part).backward()
                total += float(part.detach())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), plan.clip)
        scaler.step(optimizer)
        scaler.update()
        losses.append(total)
        fit.steps += 1
        if int(done * plan.looks) > looked and done >= settled:
            looked = int(done * plan.looks)
            best, kept = _look(fit, losses, judged, began, best, every, kept)
    if fit.steps:
        if before_step is not None:
            before_step(1.0)
        best, kept = _look(fit, losses, judged, began, best, every, kept)
    with torch.no_grad():
        for each, value in zip(every, kept, strict=True):
            each.copy_(value)
    fit.after, fit.seconds = best, time.monotonic() - began
    return fit


def _look(
    fit: Fit, losses: list[float], judged: Callable[[], float], began: float, best: float,
    every: list[Tensor], kept: list[Tensor],
) -> tuple[float, list[Tensor]]:  # fmt: skip
    now = judged()
    fit.curve.append((fit.steps, time.monotonic() - began, sum(losses) / max(len(losses), 1), now))
    losses.clear()
    return (now, _copies(every)) if now < best else (best, kept)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [each.detach().clone() for each in tensors]


def autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Products in the small type, everything else as it is."""
    dtype = getattr(torch, precision)
    return torch.autocast(device, dtype=dtype if precision != "float32" else torch.bfloat16, enabled=precision != "float32")


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
