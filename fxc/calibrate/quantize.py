"""The algorithms that quantize one weight by what its layer reads, by the names that passes give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from fxc.calibrate.descent import descend
from fxc.calibrate.gptq import gptq
from fxc.calibrate.grid import grid
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.qronos import corrected, missed

STATISTICS: Mapping[str, Callable[[int], Hessian | Squares]] = {
    "grid": Squares,
    "gptq": Hessian,
    "qronos": partial(Hessian, cross=True),
    "round": partial(Hessian, cross=True),
}
"""Of each algorithm, what makes the statistic that it reads."""


def quantized(
    algorithm: str, weight: Tensor, statistic: Hessian | Squares, levels: Levels, keep: Tensor | None = None
) -> Quantized:
    """`weight` [N, K] by `algorithm`, one of `STATISTICS`, and a statistic of what that makes.

    round is qronos, from which `signround` goes on with all layers of a block.
    keep: bool [N, K], what is False becomes exactly zero. error: as in `Quantized`; of qronos it is the gap to what the layer
    gave in the uncompressed model, which the layers before it have a part in.
    Raises InputRefused as the algorithms do.
    """
    if algorithm == "grid":
        return grid(weight if keep is None else weight * keep, levels, statistic.mean)
    aim = weight if statistic.cross is None else corrected(weight, statistic.mean, statistic.cross)
    first = gptq(aim, statistic.mean, levels, keep=keep)
    found = min(descend(aim, statistic.mean, first, keep=keep), first, key=lambda each: each.error)
    return found if statistic.cross is None else replace(found, error=missed(weight, found.dense(), statistic))
