"""Which configuration of fxc's kernels is the fastest at one size: each is checked and timed, the best one joins the race.

What is found is written as `fxc_kernels.cuda.dispatch` reads it. A configuration that a chip cannot run (shared memory,
registers) is left out when it says so.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxc.kernel_bench import cuda, weights
from fxc.kernel_bench.contender import fault
from fxc.kernel_bench.run import Entrant, Platform, Result, failure
from fxc.kernel_bench.shapes import Shape
from fxc.kernel_bench.weights import Weights, format_of, group_of, known, unfit

if TYPE_CHECKING:
    from fxc_kernels.cuda.tile import Config

ROUNDS = 3
# What the last configuration that a process began may take, before the process is taken for hung.
LAST_SECONDS = 15.0
GEMV_ROWS, SKINNY_ROWS = 4, 64


def candidates(scheme: str, m: int, capability: int) -> list[Config | None]:
    """Configurations that may be the fastest for m rows on such a chip, the shipped one among them; None is the kernel's own
    way, without one."""
    if m > SKINNY_ROWS and scheme not in ("int8", "fp8"):
        return [None]
    from fxc_kernels.cuda.tile import choose

    shipped = replace(choose(_shipped(scheme), capability, m), rows=None, fill=2)
    return list({str(each): each for each in [shipped, *_listed(scheme, m, capability)]}.values())


def _shipped(scheme: str) -> dict[int, tuple[Config, ...]]:
    from fxc_kernels.cuda import int4_linear, scaled_mm, sparse24_mma, weight_only

    if scheme.startswith("int4"):
        return int4_linear.CONFIGS[group_of(scheme)]
    return {
        "int8": scaled_mm.CONFIGS,
        "fp8": scaled_mm.CONFIGS,
        "sparse24": sparse24_mma.CONFIGS,
        "int8_sparse24": sparse24_mma.INT8_CONFIGS,
    }.get(scheme, weight_only.CONFIGS)


def _listed(scheme: str, m: int, capability: int) -> list[Config]:
    """From the literature for Hopper: tiles of 64 or more rows of the weight, 32 to 64 KB of it in flight, K in parts where
    there are few tiles."""
    from fxc_kernels.cuda import persistent_mm
    from fxc_kernels.cuda.tile import Config

    def each(rows: int, tiles: list[tuple[int, int, int, int]], splits: tuple[int, ...]) -> list[Config]:
        """tiles: n, k, warps, stages."""
        return [Config(None, rows, n, k, w, s, split) for n, k, w, s in tiles for split in splits]

    few = next((rows for rows in (16, 32, 64) if m <= rows), None)
    if scheme in ("int8", "fp8"):
        if few:
            return each(few, [(64, 256, 4, 5), (64, 512, 4, 3), (128, 128, 4, 5), (128, 256, 4, 3)], (1, 2, 4, 8))
        if m <= 512:
            tiles = [
                (64, 64, 128, 4, 5), (64, 128, 128, 4, 4), (64, 128, 256, 4, 3), (64, 256, 128, 8, 4), (128, 64, 128, 4, 4),
                (128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3),
            ]  # fmt: skip
        else:
            tiles = [
                (128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (128, 128, 128, 8, 5), (128, 256, 64, 8, 4),
                (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (256, 128, 128, 8, 4),
            ]  # fmt: skip
        persistent = persistent_mm.CONFIGS if capability >= persistent_mm.CAPABILITY else ()
        return [*(Config(None, *tile) for tile in tiles), *persistent]
    gemv = []
    if "sparse24" in scheme:
        # One number a thread: registers bound what a program can have.
        rows = next(rows for rows in (8, 16, 32, 64) if m <= rows)
        tiles = [
            (16, 128, 4, 1), (16, 128, 8, 1), (16, 256, 8, 1), (32, 64, 8, 1), (32, 128, 4, 1), (32, 128, 8, 1),
            (32, 256, 8, 1), (64, 64, 8, 1), (64, 128, 8, 1),
        ]  # fmt: skip
        return each(rows, tiles, (1, 2, 4))
    if m <= GEMV_ROWS:
        rows = next(rows for rows in (1, 2, 4) if m <= rows)
        tiles = [(4, 1024, 4, 2), (8, 512, 4, 2), (8, 1024, 4, 2), (16, 512, 4, 2), (16, 512, 8, 2)]
        gemv = each(rows, tiles, (1, 2, 4, 8))
    if scheme.startswith("int4"):
        group = group_of(scheme)
        # Tiles from which a thread still loads 16 bytes at a time.
        tiles = {
            128: [(64, 128, 4, 3), (64, 128, 4, 5), (128, 128, 8, 4)],
            64: [(128, 64, 4, 3), (128, 64, 4, 5), (256, 64, 8, 4)],
            32: [(256, 32, 8, 3), (256, 32, 8, 5)],
        }[group]
        return gemv + each(few, tiles, (1, 2, 4, 8))
    return gemv + each(few, [(64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 8, 4)], (1, 2, 4, 8))


@dataclass
class Choices:
    """A `fxc.kernel_bench.run.Tuner`. failed: "scheme configuration" -> why it was left out; compiled: what `precompile` gave,
    beside which only a scheme's first candidate is tried, because one that is compiled here takes the others' time."""

    platform: Platform
    capability: int
    schemes: tuple[str, ...]
    note: Callable[[str], None] = lambda text: None
    deadline: float | None = None
    candidates: Callable[[str, int, int], list[Any]] = candidates
    failed: dict[str, str] = field(default_factory=dict)
    compiled: dict[tuple, str | None] | None = None

    def entrants(self, shape: Shape, m: int, x: Tensor, held: dict[str, Weights]) -> list[Entrant]:
        """Of each scheme, its fastest configuration for x, ready to be timed with the others."""
        from fxc_kernels.cuda.dispatch import SCHEMES

        found = []
        for scheme in self.schemes:
            # One without a kernel of its own has nothing to choose, and no place in a table.
            if scheme not in SCHEMES or unfit(scheme, shape) or known(scheme).product.why_not(self.capability):
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                break
            try:
                best = self._fastest(scheme, m, x, held[format_of(scheme)])
            except Exception as error:  # of one scheme: what was to be timed beside it still is
                self.failed[f"{scheme} at {shape.n} x {shape.k}, M={m}"] = failure(error)
                continue
            if best is not None:
                found.append(best)
        return found

    def _fastest(self, scheme: str, m: int, x: Tensor, source: Weights) -> Entrant | None:
        rows, expected = source.reference(x)
        nbytes = sum(part.nbytes for part in source.parts)
        kernel = cuda.kernel_of(scheme)
        ready = [kernel(source.copy() if at else source) for at in range(self.platform.copies(nbytes))]
        made: dict[str, Entrant] = {}
        prepared: dict[str, Any] = {}
        for at, config in enumerate(self.candidates(scheme, m, self.capability)):
            if prepared and self.deadline is not None and time.monotonic() > self.deadline:
                break
            what = f"{scheme} {config} at {source.n} x {source.k}, M={m}"
            if at and self.compiled is not None:
                reason = self.compiled.get(compiled_as(scheme, m, config, source.k), "was not compiled in time")
                if reason is not None:
                    self.failed[what] = reason
                    continue
            contender = cuda.tuned(scheme, config)
            binds = [contender.build(each) for each in ready]
            calls = [bind(x) for bind in binds]
            try:
                wrong, _ = fault(contender, calls[0](), (m, source.n), rows, expected)
                if wrong is None:
                    prepared[str(config)] = self.platform.clock.prepare(calls)
                    made[str(config)] = Entrant(contender, source, binds)
            except Exception as error:  # what a chip lacks for a configuration, Triton and the driver say in many ways
                wrong = failure(error)
            if wrong is not None:
                self.failed[what] = wrong
        if not prepared:
            return None
        race = self.platform.clock.race(prepared, ROUNDS, watch=False)
        best = min(race.rounds, key=lambda name: median(race.rounds[name]))
        self.note(f"{scheme} {source.n} x {source.k} M={m}: the best of {len(race.rounds)} is {best}")
        return made[best]


def table(result: Result, chip: str, versions: dict[str, str | None]) -> dict[str, Any]:
    """The best configurations with their times, and the dense product's in the same race, as JSON."""
    entries = []
    for row in result.rows:
        if not row.contender.endswith(", tuned") or row.us is None:
            continue
        same = [each for each in result.rows if (each.n, each.k, each.m) == (row.n, row.k, row.m)]
        dense = min((each.us for each in same if each.baseline and each.us), default=None)
        if dense is not None:
            entries.append({"scheme": row.scheme, "n": row.n, "k": row.k, "m": row.m, "config": row.form or None,
                            "us": round(row.us, 3), "dense_us": round(dense, 3)})  # fmt: skip
    return {"chip": chip, "versions": versions, "entries": entries}


def compiled_as(scheme: str, m: int, config: Config | None, k: int) -> tuple:
    """What Triton compiles the kernel of a scheme for, as far as it matters here: configurations that differ in no more than
    the number of parts are one program, and so are weights that tiles divide alike."""
    if config is None:
        return scheme, None, k % 16 == 0
    sizes = config.m, config.n, config.k, config.warps, config.stages, config.split > 1, config.tma
    return scheme, sizes, m == 1, m % 16 == 0, k % config.k == 0, k % 16 == 0


def precompile(
    schemes: tuple[str, ...], shapes: tuple[Shape, ...], rows: tuple[int, ...], capability: int, note: Callable[[str], None],
    deadline: float | None = None,
) -> dict[tuple, str | None] | None:  # fmt: skip
    """Compile every candidate in several processes, into the cache on disk that this process then reads. deadline: of
    time.monotonic(), after which none is begun.

    Returns `compiled_as` -> None or why it cannot be, without those that there was no time for; None when it failed as a whole.
    """
    jobs: dict[tuple, tuple] = {}
    for shape in shapes:
        for m in rows:
            for scheme in (scheme for scheme in schemes if not unfit(scheme, shape)):
                for config in candidates(scheme, m, capability):
                    jobs.setdefault(compiled_as(scheme, m, config, shape.k), (shape, scheme, m, config))
    workers = min(16, os.cpu_count() or 1, max(len(jobs), 1))
    shares = [([*jobs.items()][at::workers], deadline) for at in range(workers)]
    start = time.monotonic()
    found: dict[tuple, str | None] = {}
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(_compile_share, share) for share in shares]
            over, hung = wait(running, None if deadline is None else max(deadline - start, 0.0) + LAST_SECONDS)
            for process in multiprocessing.active_children() if hung else ():
                process.terminate()
            for each in over:
                found |= each.result()
    except BrokenExecutor as error:  # a process was killed, for its memory perhaps: this one can compile too, only slower
        note(f"compiling in {workers} processes failed: {error}")
        return None
    done, spent = sum(why is None for why in found.values()), time.monotonic() - start
    note(f"compiled {done} of {len(jobs)} programs in {workers} processes, {spent:.0f} s" + f", {len(hung)} hung" * bool(hung))
    return found


def _compile_share(share: tuple[list[tuple[tuple, tuple]], float | None]) -> dict[tuple, str | None]:
    """What `precompile` gives, of a part of the jobs."""
    jobs, deadline = share
    held: dict[tuple[str, Shape], Callable[..., Tensor]] = {}
    found: dict[tuple, str | None] = {}
    for key, (shape, scheme, m, config) in jobs:
        # Of time.monotonic(), which all processes of a machine share.
        if deadline is not None and time.monotonic() > deadline:
            break
        try:
            if (scheme, shape) not in held:
                # Few at a time: other processes have theirs.
                held = dict([*held.items()][-3:])
                held[scheme, shape] = cuda.kernel_of(scheme)(weights.make(format_of(scheme), shape, "cuda"))
            held[scheme, shape](torch.ones(m, shape.k, device="cuda", dtype=torch.bfloat16), config=config)
            torch.cuda.synchronize()
            found[key] = None
        except Exception as error:  # what a chip lacks for a configuration, Triton and the driver say in many ways
            found[key] = failure(error)
            if not _device_works():  # after a fault nothing runs in this process any more: the rest is not to blame
                break
    return found


def _device_works() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
