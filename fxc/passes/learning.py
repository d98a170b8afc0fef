"""How a pass learns from calibration data: what it needs is said first, or refused, and what it does is saved as it goes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import fx

from fxc.calibrate import runner
from fxc.calibrate.needs import Needs
from fxc.calibrate.runner import Compress, Finish, Restore, Statistic
from fxc.ir.digest import digest_of
from fxc.ir.program import Program
from fxc.passes.base import Context, Pass


def learn(
    by: Pass,
    program: Program,
    layers: Collection[fx.Node],
    context: Context,
    compress: Compress,
    restore: Restore,
    *,
    statistic: Callable[[int], Statistic],
    finish: Finish | None = None,
    result: int = 0,
    lighter: str | None = None,
    what: str = "learns",
) -> Needs:
    """`runner.run` for the pass `by` on `context.samples`; what it needed, wherever hidden states were.

    result: bytes of what the layers become; lighter: the option with which `by` would learn from fewer statistics; what: it
    does, where it runs more than once. Raises `ResourceError` where there is not enough memory.
    """
    samples = context.samples
    needs = runner.needs(program, layers, samples, statistic, result)
    here = replace(needs, on_disk=context.saves is not None and not context.saves.in_memory)
    context.say(f"{by} {what} from {len(samples)} samples, with {here}")
    here.check(str(by), None if lighter is None or lighter in str(by) else lighter)
    journal = context.saves.journal(_key(by, program, layers, context, what)) if context.saves else None
    if journal and journal.began:
        context.say(f"{by} goes on: {journal.began} of {len(needs.stages)} stages are done")
    runner.run(
        program, layers, samples, compress, statistic=statistic, finish=finish, track=context.track, journal=journal,
        restore=restore,
    )  # fmt: skip
    return needs


def _key(by: Pass, program: Program, layers: Collection[fx.Node], context: Context, what: str) -> dict[str, Any]:
    """All that the result depends on, to the last bit."""
    return {
        "pass": f"{by} {what}",
        "program": digest_of(program.constants.values(), str(program)),
        "layers": [layer.name for layer in layers],
        "samples": digest_of(tensor for sample in context.samples for tensor in sample),
        "seed": context.seed,
        "versions": [metadata.version("fxc"), torch.__version__, platform.python_version()],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
    }
