"""One way to compute a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import util

import torch
from torch import Tensor

from fxc.kernel_bench.weights import Weights

# A call of a layer: it computes the product and gives it.
Call = Callable[[], Tensor]
# x [M, K] -> a call on it. What is done here is not timed.
Bind = Callable[[Tensor], Call]

# Root mean square of the error over that of the result, for activations of each kind: half a step of bfloat16 is 0.0017 of a
# number, rounding normal numbers to 256 steps of their range costs 0.9 %, and e4m3 has 0.026.
EXACT, HALF, INT8, FP8 = 1e-4, 6e-3, 2e-2, 4e-2
# Of the largest single error, over the one above: of 10^8 normal errors the largest is 5.7 times their root mean square.
LARGEST = 8.0


@dataclass(frozen=True)
class Contender:
    """build: weights, made ready once -> what binds an input.

    scheme: under which it is compared, "bf16" and "float32" being the dense ones; kind: the format of its weights;
    tolerance: the largest relative error (root mean square) that its kind of activations explains; x_size: bytes of a number
    of x as it is timed, where that is not `dtype`; ours: of fxc; baseline: a dense bfloat16 product that speed-ups are over;
    needs: top-level modules; absent: why it is not there, beyond missing modules; holds: bytes that it keeps for each weight;
    rotates: whether several copies of it may take turns; form: of what build gave, how it runs, in words.
    """

    name: str
    scheme: str
    kind: str
    build: Callable[[Weights], Bind]
    tolerance: float
    dtype: torch.dtype = torch.bfloat16
    x_size: int | None = None
    ours: bool = False
    baseline: bool = False
    needs: tuple[str, ...] = ()
    absent: str | None = None
    holds: float = 2.0
    rotates: bool = True
    form: Callable[[Bind], str] = lambda bind: ""

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a number of x and of y."""
        return self.x_size or self.dtype.itemsize, self.dtype.itemsize

    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""
        lacking = [name for name in self.needs if util.find_spec(name) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else self.absent


def of_function(function: Callable[[Tensor], Tensor]) -> Bind:
    """The function itself as what is timed."""
    return lambda x: partial(function, x)


def errors(got: Tensor, rows: Tensor, expected: Tensor) -> tuple[float, float]:
    """(root mean square, largest) of the difference, both over the root mean square of `expected`; NaN counts as infinite."""
    scale = expected.square().mean().sqrt()
    difference = (got[rows].float() - expected).div_(scale)
    rms, largest = difference.square().mean().sqrt().item(), difference.abs().max().item()
    return (rms, largest) if rms == rms else (float("inf"), float("inf"))


def fault(
    contender: Contender, got: Tensor, shape: tuple[int, int], rows: Tensor, expected: Tensor
) -> tuple[str | None, float]:
    """(what is wrong with a result, or None; its relative error)."""
    if tuple(got.shape) != shape or got.dtype != contender.dtype:
        return f"gives {got.dtype}{list(got.shape)} instead of {contender.dtype}{list(shape)}", float("inf")
    rms, largest = errors(got, rows, expected)
    if rms <= contender.tolerance and largest <= LARGEST * contender.tolerance:
        return None, rms
    limits = f"{contender.tolerance:g} and {LARGEST * contender.tolerance:g} are allowed"
    return f"relative error {rms:.3g}, at one place {largest:.3g}; {limits}", rms


def int8pack(weights: Weights) -> Bind:
    """torch's weight-only int8 product, the same operator on both kinds of machine."""
    qweight, scale = weights.parts[0], weights.parts[1].bfloat16()
    return of_function(lambda x: torch.ops.aten._weight_int8pack_mm(x, qweight, scale))
