"""The range of what a layer reads, and the scale and zero point of its 256 levels.

`Range` is a histogram of a fixed number of bins. Their width is a power of two and doubles, two becoming one, when a number
lies outside, so that the result does not depend on the order of samples; the smallest and the largest number are kept exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fxc import ranks
from fxc.errors import InputRefused

Observer = Literal["minmax", "percentile", "mse"]

HALF = 4096
"""Bins on either side of 0."""
LEVELS = 256
# The share of the numbers within the range that the percentile observer takes.
SHARE = 0.9999
# The mse observer tries so many ends on either side, evenly from an end of the range down to SHORTEST of it.
TRIED = 40
SHORTEST = 0.2
# What is cut off is lost in the same numbers each time, and does not cancel out in a sum as rounding does. Of 1, 4 and 16 this
# kept the most of sentences' embeddings.
CUT = 4


class Range:
    """rows: how many vectors were counted; counts float64 [2 * HALF]: of the numbers in bins of `width`, those from
    -HALF * width on; zeros: of exact zeros, which are in the bins too; low <= 0 and high >= 0: the ends, float64."""

    def __init__(self, width: int = 1, *, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.width = 0.0
        self.counts = torch.zeros(2 * HALF, dtype=torch.float64, device=device)
        self.ends = torch.zeros(2, dtype=torch.float64, device=device)
        self.zeros = 0

    @property
    def low(self) -> float:
        return self.ends[0].item()

    @property
    def high(self) -> float:
        return self.ends[1].item()

    @property
    def middles(self) -> Tensor:
        """Of the bins, float64."""
        return (torch.arange(-HALF, HALF, dtype=torch.float64, device=self.counts.device) + 0.5) * self.width

    def add(self, inputs: Tensor) -> None:
        """Count `inputs` in, of any shape. Raises InputRefused for NaN and Inf, and for integers."""
        if not inputs.is_floating_point():
            raise InputRefused("a layer that reads integers has no range to learn", why=str(inputs.dtype))
        x = inputs.detach().float()
        if not x.numel():
            return
        low, high = x.aminmax()
        if not (low.isfinite() and high.isfinite()):
            bad = int((~x.isfinite()).sum())
            raise InputRefused("a layer reads NaN or Inf", why=f"{bad} of {x.numel()} numbers are")
        self.ends[0], self.ends[1] = torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high)
        if (largest := max(-low.item(), high.item())) > 0:
            self._reach(largest)
            at = (x.flatten() / self.width).floor_().to(torch.int64).clamp_(-HALF, HALF - 1).add_(HALF)
            self.counts += torch.bincount(at, minlength=2 * HALF)
            self.zeros += int((x == 0).sum())
        self.rows += x.numel() // max(x.shape[-1], 1)

    def meet(self) -> None:
        """Become the range of what all processes of this run have counted."""
        low, high = ranks.largest(self.ends * torch.tensor([-1.0, 1.0], dtype=torch.float64)).tolist()
        self.ends = torch.tensor([-low, high], dtype=torch.float64)
        if (largest := max(low, high)) > 0:
            self._reach(largest)
        self.counts = ranks.added_tensor(self.counts)
        self.zeros, self.rows = int(ranks.added(self.zeros)), int(ranks.added(self.rows))

    def _reach(self, largest: float) -> None:
        """Widen the bins until `largest` lies in them."""
        exact = max(largest / HALF, 2.0**-126)
        width = 2.0 ** math.ceil(math.log2(exact))
        if not self.width:
            self.width = width
        while self.width < width:
            merged = self.counts.view(HALF, 2).sum(1)
            self.counts = torch.cat([merged.new_zeros(HALF // 2), merged, merged.new_zeros(HALF // 2)])
            self.width *= 2

    def ends_by(self, observer: Observer) -> tuple[float, float]:
        """The ends (low, high) of the range that the levels are to cover: minmax takes all numbers, percentile all but one in
        ten thousand, cut off half on either side, mse those where rounding and CUT times what is cut off lose least."""
        if observer == "minmax" or not self.width:
            return self.low, self.high
        middles = self.middles
        if observer == "percentile":
            below = self.counts.cumsum(0) / self.counts.sum()
            low = middles[int((below <= (1 - SHARE) / 2).sum())].item()
            high = middles[min(int((below < 1 - (1 - SHARE) / 2).sum()), 2 * HALF - 1)].item()
            return max(min(low, 0.0), self.low), min(max(high, 0.0), self.high)
        shares = torch.linspace(1, SHORTEST, TRIED, dtype=torch.float64, device=self.counts.device)
        lows, highs = self.low * shares, self.high * shares
        cut_low = _beyond(-middles.flip(0), self.counts.flip(0), -lows)
        cut_high = _beyond(middles, self.counts, highs)
        # Numbers are spread evenly within a step, but for zeros, which are levels.
        steps = (highs[None] - lows[:, None]) / (LEVELS - 1)
        lost = steps.square() / 12 * (self.counts.sum() - self.zeros) + CUT * (cut_low[:, None] + cut_high[None])
        best = int(lost.argmin())
        return lows[best // TRIED].item(), highs[best % TRIED].item()

    def scale_and_zero(self, observer: Observer) -> tuple[float, int]:
        """The scale, a number of float32, and the zero point 0..255 of the 256 levels; 1 and 0 where all was zero."""
        low, high = self.ends_by(observer)
        scale = torch.tensor((high - low) / (LEVELS - 1), dtype=torch.float32).item()
        if scale < torch.finfo(torch.float32).tiny:
            return 1.0, 0
        return scale, min(max(round(-low / scale), 0), LEVELS - 1)

    def float_scale(self, largest: float) -> float:
        """The scale, a number of float32, that puts the largest magnitude at `largest`; 1 where all was zero."""
        scale = torch.tensor(max(-self.low, self.high) / largest, dtype=torch.float32).item()
        return scale if scale >= torch.finfo(torch.float32).tiny else 1.0

    def error_of(self, rounded: Callable[[Tensor], Tensor]) -> float:
        """What `rounded` loses of the numbers, taken for the middles of their bins, a share of their energy."""
        if not self.width:
            return 0.0
        lost = (self.counts * (self.middles - rounded(self.middles)).square()).sum()
        return (lost / (self.counts * self.middles.square()).sum()).item()

    def beyond(self, scale: float, zero: int) -> float:
        """The share of the numbers that lie beyond the range of the levels, and are cut off to its ends."""
        if not self.width:
            return 0.0
        low, high = -(zero + 0.5) * scale, (LEVELS - 1 - zero + 0.5) * scale
        is_beyond = (self.middles < low) | (self.middles > high)
        return (self.counts[is_beyond].sum() / self.counts.sum()).item()

    def error(self, scale: float, zero: int) -> float:
        """What the levels lose of the numbers, a share of their energy: 0 where all were zero."""
        if not self.width:
            return 0.0
        middles = self.middles
        kept = middles.clamp(-zero * scale, (LEVELS - 1 - zero) * scale)
        inside = self.counts.sum() - self.zeros
        lost = (self.counts * (middles - kept).square()).sum() + inside * scale * scale / 12
        return (lost / (self.counts * middles.square()).sum()).item()


def _beyond(middles: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """Of each end the squared distance to it of the numbers above it, added up."""
    return torch.stack([(counts * (middles - end).clamp(min=0).square()).sum() for end in ends])
