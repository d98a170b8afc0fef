"""Models that are larger than memory: where what passes make of them goes, what that takes, and how long."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxc import ranks
from fxc.artifact.manifest import versions
from fxc.artifact.spill import Spill
from fxc.captured import Captured
from fxc.errors import FxcError, InputRefused, ResourceError, UsageError
from fxc.ir.program import Program
from fxc.ir.store import PART_BYTES, Constants
from fxc.mapped import READ_BYTES, in_memory, keep_freed, keep_no_more, let_go
from fxc.memory import BESIDES, TIMES, available
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.float_weights import FloatWeights
from fxc.passes.linears import PackLinears
from fxc.pipeline import rehearsed, run_passes
from fxc.schemes.scheme import AT_ONCE

# Torch, transformers and fxc with the graph of some tens of layers, as measured.
PROCESS = 5 << 27


def constants_of(captured: Captured, options: Options) -> Constants:
    """The constants of a captured program whose weights are mapped. What is put in is written to `options.resume`, where it
    stays, else to a temporary folder, which goes when they do."""
    folder = Path(options.resume) if options.resume is not None else Path(tempfile.mkdtemp(prefix="fxc-"))
    spill = Spill(folder, key_of(captured, options))
    let_go(captured.program.constants.values())
    keep_freed()
    constants = Constants(captured.program.constants, spill)
    weakref.finalize(spill, keep_no_more)
    if options.resume is None:
        weakref.finalize(spill, shutil.rmtree, folder, ignore_errors=True)
    return constants


def meet(options: Options) -> None:
    """Meet the other processes that torchrun started, which share the layers. Raises `UsageError` for a pass that they cannot
    share."""
    ranks.join()
    for each in options.passes if ranks.count() > 1 else ():
        if each.is_policy and (not isinstance(each, PackLinears) or each.uses_data()):
            raise UsageError(
                "several processes share the layers of formats that learn nothing from data", where=str(each),
                why="it looks at more than a layer" if not each.uses_data() else "it learns from data layer after layer",
                hint="run it in one process",
            )  # fmt: skip


def key_of(captured: Captured, options: Options) -> dict[str, Any]:
    """All that the bytes of the result depend on, as JSON: two runs with the same one may go on from each other."""
    folder = captured.folder
    times = {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))} if folder else {}
    return {
        "source": captured.source, "written": times, "passes": [str(each) for each in options.passes],
        "skip": list(options.skip) if not isinstance(options.skip, str) else [options.skip], "seed": options.seed,
        "part": options.part, "versions": versions(),
        "calib": [str(options.calib), options.calib_samples, options.calib_length] if options.calib is not None else None,
        "threads": torch.get_num_threads() if options.calib is not None else None,
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What compiling takes. weights: bytes of the source; result: bytes of what is written, None where only values tell;
    is_streamed: whether the model is read piece by piece; memory: bytes at most, about; left: bytes that there are, None where
    nobody knows; seconds: about, None where no pass says."""

    weights: int
    result: int | None
    is_streamed: bool
    memory: int
    left: int | None
    seconds: float | None

    def __str__(self) -> str:
        result = "depends on the weights" if self.result is None else _gigabytes(self.result)
        how = "read from its files piece by piece" if self.is_streamed else "in memory as a whole"
        left = "" if self.left is None else f" of {_gigabytes(self.left)}"
        took = "" if self.seconds is None else f"; about {_duration(self.seconds)}"
        return f"weights {_gigabytes(self.weights)}, {how}: {_gigabytes(self.memory)}{left} of memory; result {result}{took}"

    def check(self) -> None:
        """Raises `ResourceError` where there is not so much memory."""
        if self.is_streamed and self.left is not None and self.memory > self.left:
            raise ResourceError(
                f"compiling takes about {_gigabytes(self.memory)} of memory, and there are {_gigabytes(self.left)}",
                why=self, hint="a larger --max-memory, or a machine with more memory",
            )  # fmt: skip


def plan_of(captured: Captured, options: Options) -> Plan:
    """What it takes to compile a captured model. The passes run over it without its values, which takes seconds; of passes that
    need values no result is known. How fast weights are packed is tried on a part of the largest one.

    memory, where it is read piece by piece: of the process, of what no file holds, of a part that waits and one that is
    written, of what was read last, and twice of the largest that passes make of one weight, or of the first layers where they
    are rehearsed on those. The model's own size is not in it."""
    left = options.max_memory if options.max_memory is not None else available()
    weights = captured.program.nbytes()
    plain = captured.program.copy()
    plain.constants = {name: tensor.to("meta") for name, tensor in captured.program.constants.items()}
    try:
        result = _planned(plain, options).nbytes()
    except FxcError:
        result = None
    if not captured.is_streamed:
        return Plan(weights, result, False, TIMES * weights + BESIDES, left, None)
    tried = captured.small.nbytes() if captured.small is not None else 0
    is_made = captured.small is not None and any(each.is_policy for each in rehearsed(captured.small, options))
    made = 2 * max(_largest_made(plain, options), tried if is_made else 0)
    parts = 2 * min(PART_BYTES, weights) + min(READ_BYTES, weights)
    memory = PROCESS + in_memory(captured.program.constants.values()) + max(parts + made, tried)
    return Plan(weights, result, True, memory, left, _seconds(captured.program, options))


def _planned(plain: Program, options: Options) -> Program:
    """What passes make of a program without its values."""
    chosen = replace(options, verify=False, dump_dir=None, allow_noop=True)
    return run_passes(plain, Context(skip=options.skip, seed=options.seed), chosen)[0]


def _largest_made(plain: Program, options: Options) -> int:
    """Bytes of the most that passes make of one weight of a program without its values."""
    sizes = {name: each.nbytes for name, each in plain.constants.items()}
    if any(isinstance(each, FloatWeights) for each in options.passes):
        return max(sizes.values(), default=0)
    made: Counter[str] = Counter()
    try:
        after = _planned(plain, options)
    except FxcError:
        # Values tell which units of layers go, and what is left of a weight is no larger than it is.
        made.update({name: size for name, size in sizes.items() if any(map(str.isdecimal, name.split(".")))})
        after = _planned(plain, replace(options, passes=[each for each in options.passes if isinstance(each, PackLinears)]))
    for name, each in after.constants.items():
        if each is not plain.constants.get(name):
            made[name.rpartition(".")[0]] += each.nbytes
    return max(made.values(), default=0)


def _seconds(program: Program, options: Options) -> float | None:
    """By the time that each pass takes to read and pack some rows of the largest weight."""
    weight = max((each for each in program.constants.values() if each.ndim == 2), key=lambda each: each.nbytes, default=None)
    passes = [each for each in options.passes if isinstance(each, PackLinears) and each.statistic() is None]
    if weight is None or not passes or len(passes) < sum(each.is_policy for each in options.passes):
        return None
    total = 0.0
    for each in passes:
        some = weight[: max(AT_ONCE // weight.shape[1], 1)]
        begin = time.perf_counter()
        try:
            each.pack(some)
        except InputRefused:  # this one stays as it is
            return None
        total += (time.perf_counter() - begin) * program.numel() / some.numel()
    return total


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
