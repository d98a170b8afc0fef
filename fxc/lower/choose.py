"""Which form of a linear layer is faster on this machine: measured once for each size and dtype, and remembered."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

from fxc.lower import remembered
from fxc.lower.packed import DenseLinear, Int8Linear, SplitLinear, int8_product, to_uint8
from fxc.lower.remembered import Timing
from fxc_kernels.int8_linear import quantize_rows

# One token, a few sequences decoding together, a prompt, a batch of them.
ROWS = (1, 16, 128, 256)
# SplitLinear doubles the rows: beside a bfloat16 product it wins for few.
WEIGHT_ONLY_ROWS = (1, 8, 32, 128, 256)
# int8 has to win by this factor: what it saves must be above the noise of the measurement.
MARGIN = 0.95
# A layer that is kept in one form may be so much slower than in the other at a row count, where it is faster on the whole.
SLOWEST = 0.85
# Both forms run in turns, so that another process slows both down; the best of each counts.
_SECONDS = 3e-3
_ROUNDS = (6, 100)
# Products that take long are steady: they get as many rounds as fit into this, and two at least.
_LONG_SECONDS = 0.1
# So much slower after one call each, a form has lost.
_HOPELESS = 10


def _seconds(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _race(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of several calls of each, in turns."""
    first(), second()
    start = time.perf_counter()
    times: tuple[list[float], list[float]] = ([], [])
    for done in range(1, _ROUNDS[1] + 1):
        for each, run in zip(times, (first, second), strict=True):
            each.append(_seconds(run))
        spent = time.perf_counter() - start
        if _is_hopeless(times) or (done >= _ROUNDS[0] and spent > _SECONDS) or (done >= 2 and spent > _LONG_SECONDS):
            break
    return times


def _is_hopeless(times: tuple[list[float], list[float]]) -> bool:
    a, b = map(min, times)
    return max(a, b) > _HOPELESS * min(a, b)


def _is_steady(times: tuple[list[float], list[float]]) -> bool:
    """Whether both halves of a race say the same of who won. What other processes do to the machine only ever adds, but it may
    add to all the calls of one form."""
    halves = [[min(each[half::2]) for each in times] for half in (0, 1) if len(times[0]) > 1]
    return len({a <= MARGIN * b for a, b in halves}) <= 1


@functools.cache
def measure(
    out_features: int, in_features: int, dtype: torch.dtype, weight_only: bool, quantize: bool, threads: int
) -> Timing:
    """Time the int8 and the float form of one layer [N, K] for each count in ROWS (WEIGHT_ONLY_ROWS), or take what an earlier
    process measured on a machine like this one (`fxc.lower.remembered`).

    weight_only: the int8 form keeps the activations (SplitLinear) instead of quantizing them (Int8Linear).
    quantize: count what surrounds the int8 product too (in eager it is calls of its own, a compiler fuses it).
    threads: torch.get_num_threads(), since the answer depends on it.
    """
    counts = WEIGHT_ONLY_ROWS if weight_only else ROWS
    kind = ("weight-only" if weight_only else "int8") + (" whole" if quantize else " product")
    layer = f"{kind} {str(dtype).removeprefix('torch.')} {out_features}x{in_features}"
    known = remembered.recall(layer, threads)
    if known is not None and tuple(known) == counts:
        return known
    timing, steady = compare(out_features, in_features, dtype, weight_only, quantize, counts)
    if steady:
        remembered.keep(layer, threads, timing)
    return timing


def compare(
    out_features: int, in_features: int, dtype: torch.dtype, weight_only: bool, quantize: bool, counts: tuple[int, ...]
) -> tuple[Timing, bool]:
    """What `measure` remembers, measured now for the row counts `counts`, and whether it can be relied on."""
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.full((out_features,), 1e-3)
    layer = (SplitLinear if weight_only else Int8Linear)(qweight, scale, None)
    dense = DenseLinear((qweight.float() * 1e-3).to(dtype), None)
    timing: Timing = {}
    steady = True
    for rows in counts:
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        q = to_uint8(quantize_rows(torch.cat([x, x]) if weight_only else x)[0])
        product = functools.partial(int8_product, q, layer.packed, scale, layer.zero_point)
        times = _race(functools.partial(layer, x) if quantize else product, functools.partial(dense, x))
        timing[rows] = (min(times[0]), min(times[1]))
        steady = steady and _is_steady(times)
        if timing[rows][0] > _HOPELESS * timing[rows][1]:
            # Reference code, which more rows only make slower: nobody waits for that.
            timing |= {more: timing[rows] for more in counts if more > rows}
            break
    return timing, steady


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
    """Whether int8 is faster in the geometric mean over the measured row counts, and at none of them slower than SLOWEST."""
    gains = [as_float / as_int8 for as_int8, as_float in timing.values()]
    return math.prod(gains) ** (1 / len(gains)) > 1 / MARGIN and min(gains) >= SLOWEST


def split_limit(timing: Timing) -> int | None:
    """Up to how many rows weight-only int8 wins: at every measured row count up to there; 0 for never, None for always."""
    limit = 0
    for rows in sorted(timing):
        as_int8, as_float = timing[rows]
        if as_int8 > MARGIN * as_float:
            return limit
        limit = rows
    return None
