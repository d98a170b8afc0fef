"""How a pass learns from calibration data: what it needs is said first, or refused, and what it does is saved as it goes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import fx

from fxc import ranks
from fxc.calibrate import runner
from fxc.calibrate.needs import Needs, nbytes_of, needs_of, symbols_of
from fxc.calibrate.runner import Compress, Finish, Restore
from fxc.calibrate.stages import Statistic
from fxc.errors import ResourceError
from fxc.ir.digest import digest_of
from fxc.ir.program import Program
from fxc.memory import available
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
    ranks.join()
    samples = context.samples
    needs = needs_of(program, layers, samples, statistic, result, finish)
    saves = context.saves if ranks.count() == 1 else None
    here = replace(needs, on_disk=saves is not None and not saves.in_memory)
    context.say(f"{by} {what} from {len(samples)} samples, with {here}")
    here.check(str(by), None if lighter is None or lighter in str(by) else lighter)
    key = key_of(by, program, context, layers=[layer.name for layer in layers], what=what)
    journal = saves.journal(key) if saves else None
    if ranks.count() > 1:
        how = f"{ranks.count()} processes share the samples" if finish is None else "each process goes through all samples"
        context.say(f"{how}; nothing is saved on the way")
    if journal and journal.began:
        context.say(f"{by} goes on: {journal.began} of {len(needs.stages)} stages are done")
    runner.run(
        program, layers, samples, compress, statistic=statistic, finish=finish, track=context.track, journal=journal,
        restore=restore,
    )  # fmt: skip
    return needs


def announce_backward(by: Pass, program: Program, context: Context, numbers: int = 0) -> None:
    """Say what gradients through the whole of `program` are going to take for the pass `by`, by sample. numbers: how many
    have a gradient and a score. Raises `ResourceError` where there is not enough memory."""
    if not context.samples:
        return
    largest = max(context.samples, key=lambda sample: sum(each.numel() for each in sample))
    sizes = symbols_of(program, largest)
    values = sum(nbytes_of(node.meta["val"], sizes) for node in program.graph.nodes if node.op == "call_function")
    scores, left = 8 * numbers, available()
    said = f"{values / 1e6:.1f} MB for what one sample gives in all layers and {scores / 1e6:.1f} MB for gradients and scores"
    context.say(f"{by} needs gradients through the whole model, with {said}")
    if left is not None and values + scores > left:
        raise ResourceError(
            f"its gradients need {(values + scores) / 1e9:.2f} GB of memory and {left / 1e9:.2f} GB are left",
            where=str(by),
            why=said,
            hint="shorter samples (--calib-length); or criterion=wanda, which needs no gradients",
        )


def key_of(by: Pass, program: Program, context: Context, **more: Any) -> dict[str, Any]:
    """All that the result depends on, to the last bit; more: what else, as JSON."""
    return more | {
        "pass": str(by),
        "program": digest_of(program.constants.values(), str(program)),
        "samples": digest_of(tensor for sample in context.samples for tensor in sample),
        "seed": context.seed,
        "versions": [metadata.version("fxc"), torch.__version__, platform.python_version()],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
    }
