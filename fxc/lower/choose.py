"""Which form of a linear layer is faster on this machine: measured once for each size, dtype and process."""

import functools
import math
import time
from collections.abc import Callable

import torch

from fxc.lower.packed import DenseLinear, Int8Linear, SplitLinear, int8_product, to_uint8
from fxc_kernels.int8_linear import quantize_rows

# One token, a few sequences decoding together, one prompt.
ROWS = (1, 16, 128)
# SplitLinear doubles the rows: beside a bfloat16 product it wins for few.
WEIGHT_ONLY_ROWS = (1, 8, 32, 128)
# int8 has to win by this factor: what it saves must be above the noise of the measurement.
MARGIN = 0.95
# Both forms run in turns, so that another process slows both down; the best of each counts.
_SECONDS = 3e-3
_ROUNDS = (7, 100)

# rows -> (seconds as int8, seconds as float)
Timing = dict[int, tuple[float, float]]


def _seconds(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _race(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the fastest of several calls of each: what other processes do to the machine only ever adds."""
    first(), second()
    best = [float("inf"), float("inf")]
    start = time.perf_counter()
    for done in range(_ROUNDS[1]):
        best = [min(best[0], _seconds(first)), min(best[1], _seconds(second))]
        if done + 1 >= _ROUNDS[0] and time.perf_counter() - start > _SECONDS:
            break
    return best[0], best[1]


@functools.cache
def measure(
    out_features: int, in_features: int, dtype: torch.dtype, weight_only: bool, quantize: bool, threads: int
) -> Timing:
    """Time the int8 and the float form of one layer [N, K] for each count in ROWS (WEIGHT_ONLY_ROWS).

    weight_only: the int8 form keeps the activations (SplitLinear) instead of quantizing them (Int8Linear).
    quantize: count what surrounds the int8 product too (in eager it is calls of its own, a compiler fuses it).
    threads: torch.get_num_threads(), since the answer depends on it.
    """
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.full((out_features,), 1e-3)
    layer = (SplitLinear if weight_only else Int8Linear)(qweight, scale, None)
    dense = DenseLinear((qweight.float() * 1e-3).to(dtype), None)
    timing: Timing = {}
    for rows in WEIGHT_ONLY_ROWS if weight_only else ROWS:
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        q = to_uint8(quantize_rows(torch.cat([x, x]) if weight_only else x)[0])
        product = functools.partial(int8_product, q, layer.packed, scale, layer.zero_point)
        run = functools.partial(layer, x) if quantize else product
        timing[rows] = _race(run, functools.partial(dense, x))
    return timing


def compressed(out_features: int, in_features: int, dtype: torch.dtype) -> Timing:
    """Instead of `measure`, where the compressed form is wanted whatever its time: it never loses."""
    return {rows: (1.0, float("inf")) for rows in WEIGHT_ONLY_ROWS}


def reason(timing: Timing) -> str:
    asked = all(as_float == float("inf") for _, as_float in timing.values())
    return "asked for" if asked else f"measured: {describe(timing)}"


def describe(timing: Timing) -> str:
    """ "M=1: int8 31 us, float 44 us; ..." """
    return "; ".join(f"M={m}: int8 {a * 1e6:.0f} us, float {b * 1e6:.0f} us" for m, (a, b) in timing.items())


def int8_from(timing: Timing) -> int | None:
    """The smallest row count from which int8 wins at every larger measured one; None when it loses at the largest."""
    first = None
    for rows in sorted(timing, reverse=True):
        as_int8, as_float = timing[rows]
        if as_int8 > MARGIN * as_float:
            break
        first = rows
    return first


def dense_limit(timing: Timing) -> int | None:
    """Up to how many rows the float form is to be used: 0 for never, None for always."""
    first = int8_from(timing)
    if first is None:
        return None
    return max((rows for rows in timing if rows < first), default=0)


def wins_on_the_whole(timing: Timing) -> bool:
    """Whether int8 is faster in the geometric mean over the measured row counts."""
    return math.prod(as_float / as_int8 for as_int8, as_float in timing.values()) ** (1 / len(timing)) > 1 / MARGIN


def split_limit(timing: Timing) -> int | None:
    """Up to how many rows weight-only int8 wins: at every measured row count up to there; 0 for never, None for always."""
    limit = 0
    for rows in sorted(timing):
        as_int8, as_float = timing[rows]
        if as_int8 > MARGIN * as_float:
            return limit
        limit = rows
    return None


def cpu_has_int8() -> bool:
    """True when this CPU has int8 dot products (AVX512-VNNI or AMX) that oneDNN uses."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
