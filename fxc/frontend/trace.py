"""`torch.export`, kept silent and to graphs that are the same everywhere."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import contextmanager

import torch
from torch import nn

from fxc.errors import CaptureFailed
from fxc.frontend.calls import AUTO, Call
from fxc.ir.cache import KIND, is_past
from fxc.ir.recurrent import symbolic_lengths


def trace(call: Call) -> torch.export.ExportedProgram:
    """What torch.export makes of the call. Its errors are of many kinds, and each means that this model cannot be captured."""
    args = list(call.inputs.values())
    if call.stacks:
        past = [t for name, t in call.inputs.items() if is_past(name)]
        rows = args[: -len(past)]
        stacked = tuple(torch.stack([past[i] for i in stack]) for stack in call.stacks)
        given = [call.dynamic.get(name, {0: AUTO, 1: AUTO}) for name in call.inputs if not is_past(name)]
        behind = ({1: AUTO, 3: AUTO},) * len(stacked)
        dynamic = (*given, behind) if call.kind == KIND else ((*given, *behind),)
        return _export(call.module.over(call.stacks), (*rows, *stacked), dynamic)
    dynamic = (tuple(call.dynamic[n] for n in call.inputs),)  # one entry for all of a variadic forward's arguments
    return _export(call.module, tuple(args), dynamic)


def _export(module: nn.Module, args: tuple, dynamic: tuple) -> torch.export.ExportedProgram:
    with _silent_export(), symbolic_lengths():
        return torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)


def functionalized(exported: torch.export.ExportedProgram, model: nn.Module) -> torch.export.ExportedProgram:
    """Without what writes through views. Raises `CaptureFailed` for a model that writes to a buffer or an input, and what torch
    raises where it cannot do it."""
    with _silent_export():
        functional = exported.run_decompositions({})
    signature = functional.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        kind = "buffer" if signature.buffers_to_mutate else "input"
        raise CaptureFailed(
            f"the model writes to its {kind} {written[0].removeprefix('m.')}",
            where=type(model).__name__,
            why="a program keeps nothing from one call to the next",
            hint="return the value instead",
        )
    return functional


def culprit(error: BaseException, model: nn.Module) -> str:
    """The module of the model in whose forward a trace failed, by the frames of the error."""
    names = {id(module): name for name, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        found = names.get(id(owner), "") or found
        frame = frame.tb_next
    return f"{type(model).__name__}, in {found}" if found else type(model).__name__


@contextmanager
def deterministic_graphs():
    """Without kernels that transformers would take from the hub."""
    previous = os.environ.get("USE_HUB_KERNELS")
    os.environ["USE_HUB_KERNELS"] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["USE_HUB_KERNELS"]
        else:
            os.environ["USE_HUB_KERNELS"] = previous


@contextmanager
def _silent_export():
    """Without the graph that torch prints, and its warnings, where tracing fails: the error says what happened. TORCH_LOGS
    brings them back."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    loggers = [each for each in loggers if not each.disabled]
    module = importlib.import_module("torch.export._trace")
    try:
        for each in loggers:
            each.disabled = True
        module.print = lambda *_, **__: None
        yield
    finally:
        module.__dict__.pop("print", None)
        for each in loggers:
            each.disabled = False
