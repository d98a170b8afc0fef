"""Which form of a linear layer is fastest on this machine: measured once for each size and dtype, and remembered."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxc.lower import remembered
from fxc.lower.candidates import Candidate
from fxc.lower.remembered import Timing

# A form has to win over float by this factor: what it saves must be above the noise of the measurement.
MARGIN = 0.95
# A layer that is kept in one form may be so much slower than in the other at a row count, where it is faster on the whole; and
# so much where on the whole it is FAR_AHEAD times as fast, as beside bfloat16 on a CPU that does not multiply it.
SLOWEST, SLOWEST_FAR_AHEAD, FAR_AHEAD = 0.85, 0.7, 2
# A float copy of a weight is kept beside its int8 form, for the row counts where it is faster, up to this many numbers.
SMALL_LAYER = 1 << 21
# The forms run in turns, so that another process slows all of them down; the best of each counts.
_SECONDS = 3e-3
_ROUNDS = (6, 100)
# Products that take long are steady: they get as many rounds as fit into this, and two at least.
_LONG_SECONDS = 0.1
# Of a larger layer so many numbers are timed, and the times taken to be in proportion: a head of 150,000 outputs would take
# gigabytes and seconds.
LARGEST = 1 << 24
# So much slower after one call each, a form has lost.
_HOPELESS = 10
# A race is quiet where the calls of each form take no more than this, in the median, of the fastest of them, and where the
# process has this share of a core at least while it runs: one of its threads always has something to do.
_SPREAD = 1.25
_LEAST_SHARE = 0.9
# How often a race that was not quiet is run in all.
_ATTEMPTS = 3

Times = tuple[list[float], ...]
"""Seconds of the calls of each form."""
Pairs = dict[int, tuple[float, float]]
"""rows -> (seconds in one form, seconds in float)"""


class Busy(Exception):
    """The machine did other work while forms were timed, in one line: what was measured says nothing of them."""


def _seconds(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def _quiet_race(*forms: Callable[[], object]) -> tuple[Times, str | None]:
    """What `_race` gives, tried again where it was not quiet. What has lost each time has lost, whatever the noise."""
    tried: list[Times] = []
    noise: str | None = ""
    while noise is not None and len(tried) < _ATTEMPTS:
        times, noise = _race(*forms)
        tried.append(times)
    return tried[-1], None if all(map(_is_hopeless, tried)) else noise


def _race(*forms: Callable[[], object]) -> tuple[Times, str | None]:
    """Seconds of several calls of each, in turns, and why they cannot be relied on, None where they can."""
    for run in forms:
        run()
    start, worked = time.perf_counter(), time.process_time()
    times: Times = tuple([] for _ in forms)
    for done in range(1, _ROUNDS[1] + 1):
        for each, run in zip(times, forms, strict=True):
            each.append(_seconds(run))
        spent = time.perf_counter() - start
        if _is_hopeless(times) or (done >= _ROUNDS[0] and spent > _SECONDS) or (done >= 2 and spent > _LONG_SECONDS):
            break
    share = (time.process_time() - worked) / max(time.perf_counter() - start, 1e-9)
    return times, _noise(times, share)


def _noise(times: Times, share: float) -> str | None:
    """Why a race was not quiet. What other processes do to the machine only ever adds, but it may add to all the calls of one
    form. share: of a core, how much of the time the process ran."""
    if share < _LEAST_SHARE:
        return f"the process had {share:.0%} of a core"
    if _is_hopeless(times):
        return None
    spread = max(statistics.median(each) / min(each) for each in times)
    if spread > _SPREAD:
        return f"calls of one form took {spread:.1f} times as long as the fastest of them"
    return None if _is_steady(times) else "two halves of a race disagree on what is fastest"


def _is_hopeless(times: Times) -> bool:
    """Whether all forms but one have lost."""
    first, second = sorted(map(min, times))[:2]
    return second > _HOPELESS * first


def _is_steady(times: Times) -> bool:
    """Whether both halves of a race say the same of who won."""
    halves = [[min(each[half::2]) for each in times] for half in (0, 1) if len(times[0]) > 1]
    return len({tuple(a <= MARGIN * others[-1] for a in others[:-1]) for others in halves}) <= 1


Timings = dict[tuple, Timing | str]
"""(kinds of forms, N, K, dtype) -> their times, or why they could not be measured."""


def measured(backend: str, timings: Timings | None = None) -> Callable[[tuple[Candidate, ...], int, int, torch.dtype], Timing]:
    """`measure` for one lowering, in which layers that could not be timed are not tried again. timings: what is known, to which
    it adds."""
    known: Timings = {} if timings is None else timings

    def times(forms: tuple[Candidate, ...], rows: int, columns: int, dtype: torch.dtype) -> Timing:
        # Inductor fuses what surrounds the int8 product, and beside a float32 product that is little. Beside a bfloat16
        # one it is not: MiniLM at 32x128 took 172 ms with int8 chosen by its product alone and 103 ms without int8.
        whole = backend == "eager" or dtype != torch.float32
        layer = (tuple(each.kind for each in forms), rows, columns, str(dtype))
        if layer not in known:
            try:
                known[layer] = measure(forms, rows, columns, dtype, whole, torch.get_num_threads())
            except Busy as why:
                known[layer] = str(why)
        found = known[layer]
        if isinstance(found, str):
            raise Busy(found)
        return found

    return times


@functools.cache
def measure(
    forms: tuple[Candidate, ...], out_features: int, in_features: int, dtype: torch.dtype, whole: bool, threads: int
) -> Timing:
    """Time `forms` of one layer [N, K], the last of which is float, for each of their row counts, or take what an earlier
    process measured on a machine like this one (`fxc.lower.remembered`).

    whole: count what surrounds the int8 product too (in eager it is calls of its own, a compiler fuses it).
    threads: torch.get_num_threads(), since the answer depends on it.

    Raises Busy where the machine did other work meanwhile: nothing is remembered then, and the next load tries again.
    """
    if out_features * in_features > LARGEST and (part := max(LARGEST // in_features, 256)) < out_features:
        timing = measure(forms, part, in_features, dtype, whole, threads)
        return {rows: tuple(each * out_features / part for each in times) for rows, times in timing.items()}
    counts = tuple(sorted({rows for each in forms for rows in each.rows}))
    kinds = "+".join(each.kind for each in forms[:-1])
    size = f"{str(dtype).removeprefix('torch.')} {out_features}x{in_features}"
    layer = f"{kinds} {'whole' if whole else 'product'} {size}"
    known = remembered.recall(layer, threads)
    if known is not None and tuple(known) == counts and all(len(times) == len(forms) for times in known.values()):
        return known
    timing, noise = compare(forms, out_features, in_features, dtype, whole, counts)
    if noise:
        raise Busy(noise)
    remembered.keep(layer, threads, timing)
    return timing


def compare(
    forms: tuple[Candidate, ...], out_features: int, in_features: int, dtype: torch.dtype, whole: bool, counts: tuple[int, ...]
) -> tuple[Timing, str | None]:
    """What `measure` remembers, measured now for the row counts `counts`, and why it cannot be relied on, None where it can."""
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    layers = [each.trial(qweight, torch.full((out_features,), 1e-3), dtype) for each in forms]
    timing: Timing = {}
    noise = None
    for rows in counts:
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        times, found = _quiet_race(*(layer(x, whole) for layer in layers))
        timing[rows] = tuple(map(min, times))
        noise = noise or (found and f"M={rows}: {found}")
        if min(timing[rows][:-1]) > _HOPELESS * timing[rows][-1]:
            # Reference code, which more rows only make slower: nobody waits for that.
            timing |= {more: timing[rows] for more in counts if more > rows}
            break
    return timing, noise


def compressed(forms: tuple[Candidate, ...], *layer: object) -> Timing:
    """Instead of `measure`, where the compressed form is wanted whatever its time: it never loses."""
    return {rows: (*[1.0] * (len(forms) - 1), float("inf")) for rows in forms[0].rows}


@dataclass(frozen=True)
class Choice:
    """form: what the layer runs in, and in float on the other side of `limit` rows unless that is None; name: in reports;
    reason: why; gain: how much faster than in float it is, in the geometric mean over the row counts."""

    form: Candidate
    limit: int | None
    name: str
    reason: str
    gain: float = 1.0


def choose(forms: tuple[Candidate, ...], timing: Timing, is_small: bool) -> Choice:
    """Which of `forms`, the last of which is float, by what was measured. is_small: whether a layer may have a float copy
    beside another form, which for a large one would take more memory than was saved."""
    others = [_against_float(form, at, timing, is_small) for at, form in enumerate(forms[:-1])]
    taken = [each for each in others if each[1] is not None] or [(1.0, None, None)]
    gain, form, limit = max(taken, key=lambda each: (each[1] is not None and each[1].stays_packed, each[0]))
    described = describe(forms, timing)
    if form is None:
        names = ", ".join(dict.fromkeys(each.timed_as for each in forms[:-1]))
        where = "" if is_small else ", on the whole or for many rows"
        return Choice(forms[-1], None, forms[-1].name, f"{forms[-1].name}: {names} was slower{where} ({described})")
    asked = all(times[-1] == float("inf") for times in timing.values())
    reason = "asked for" if asked else f"measured: {described}"
    if limit is None:
        return Choice(form, None, form.name, reason, gain)
    here, there = ("above", "below") if form.wins_for == "many" else ("up to", "above")
    return Choice(form, limit, f"{form.name} {here} M={limit}, {forms[-1].timed_as} {there}", reason, gain)


def by_memory(forms: tuple[Candidate, ...], why: Busy) -> Choice:
    """What is taken where nothing could be measured: the form of the fewest bits, of several the first."""
    form = min(forms[:-1], key=lambda each: each.bits or math.inf)
    return Choice(form, None, form.name, f"it holds the least, and could not be timed: the machine was busy ({why})")


def alternatives(forms: tuple[Candidate, ...], timing: Timing, is_small: bool) -> list[Choice]:
    """What `choose` gives, the best single form and the best one without floats, where these are others."""
    gains = [_gain({rows: (each[at], each[-1]) for rows, each in timing.items()}, timing) for at in range(len(forms) - 1)]
    best = max(range(len(gains)), key=lambda at: (forms[at].stays_packed, gains[at]))
    compressed = Choice(forms[best], None, forms[best].name, f"measured: {describe(forms, timing)}", gains[best])
    found = [choose(forms, timing, is_small), choose(forms, timing, False), compressed]
    return [each for at, each in enumerate(found) if (each.form, each.limit) not in [(e.form, e.limit) for e in found[:at]]]


def _against_float(form: Candidate, at: int, timing: Timing, is_small: bool) -> tuple[float, Candidate | None, int | None]:
    """(the mean gain over float, `form` or None where it is slower, up to or above how many rows float is used instead)."""
    times: Pairs = {rows: (each[at], each[-1]) for rows, each in timing.items()}
    if not is_small or form.stays_packed:
        return (_gain(times, times), form, None) if wins_on_the_whole(times) else (1.0, None, None)
    if form.wins_for == "many":
        limit = dense_limit(times)
        slower, always, used = limit is None, limit == 0, [rows for rows in times if limit is not None and rows > limit]
    else:
        limit = split_limit(times)
        slower, always, used = limit == 0, limit is None, [rows for rows in times if limit is None or rows <= limit]
    if slower:
        return 1.0, None, None
    return _gain(times, used), form, None if always else limit


def _gain(times: Pairs, used: object) -> float:
    """The geometric mean over all row counts, where the form runs the counts `used` and float the others."""
    gains = [as_float / as_form if rows in used else 1.0 for rows, (as_form, as_float) in times.items()]
    return math.prod(gains) ** (1 / len(gains))


def describe(forms: tuple[Candidate, ...], timing: Timing) -> str:
    """ "M=1: int8 31 us, float 44 us; ..." """
    names = [each.timed_as for each in forms]
    return "; ".join(
        f"M={rows}: {', '.join(f'{name} {s * 1e6:.0f} us' for name, s in zip(names, times, strict=True))}"
        for rows, times in timing.items()
    )


def wins_from(times: Pairs) -> int | None:
    """The smallest row count from which a form wins at every larger measured one; None when it loses at the largest."""
    first = None
    for rows in sorted(times, reverse=True):
        as_form, as_float = times[rows]
        if as_form > MARGIN * as_float:
            break
        first = rows
    return first


def dense_limit(times: Pairs) -> int | None:
    """Up to how many rows the float form is to be used: 0 for never, None for always."""
    first = wins_from(times)
    if first is None:
        return None
    return max((rows for rows in times if rows < first), default=0)


def wins_on_the_whole(times: Pairs) -> bool:
    """Whether a form is faster in the geometric mean over the measured row counts, and at none of them slower than SLOWEST, or
    where that mean is FAR_AHEAD than SLOWEST_FAR_AHEAD."""
    gains = [as_float / as_form for as_form, as_float in times.values()]
    mean = math.prod(gains) ** (1 / len(gains))
    return mean > 1 / MARGIN and min(gains) >= (SLOWEST_FAR_AHEAD if mean >= FAR_AHEAD else SLOWEST)


def split_limit(times: Pairs) -> int | None:
    """Up to how many rows a form wins: at every measured row count up to there; 0 for never, None for always."""
    limit = 0
    for rows in sorted(times):
        as_form, as_float = times[rows]
        if as_form > MARGIN * as_float:
            return limit
        limit = rows
    return None
