"""How long each group of layers takes in each format, on this machine, at the sizes that count: timed, each shape once.

A group is timed as lowering makes it, with everything that the format does as it runs. What products with experts,
convolutions and lookups take is not known, and counts as the same in every format.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxc.frontend.capture import capture
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.lower.runnable import runnable
from fxc.lower.target import lower
from fxc.measure.contenders import Size, size_text
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.linears import PackLinears
from fxc.pipeline import run_passes
from fxc.progress import Track, untracked
from fxc.schemes.scheme import LINEAR
from fxc.selection.formats import Format
from fxc.selection.groups import Group, Space

_CALLS, _SECONDS = 20, 0.1

Shape = tuple[tuple[int, ...], int, torch.dtype, bool]
"""Outputs of each layer, inputs, dtype, whether there are biases."""


class _Layers(nn.Module):
    """Layers that read one activation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        outputs, inputs, dtype, bias = shape
        self.layers = nn.ModuleList(nn.Linear(inputs, each, bias=bias, dtype=dtype) for each in outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def rows_of(program: Program, sizes: Sequence[Size]) -> dict[str, int]:
    """ "1x128 prefill" -> how many rows layers read then."""
    found = {}
    for batch, length in sizes:
        text = size_text((batch, length))
        if is_causal_lm(program):
            found |= {f"{text} prefill": batch * length, f"{text} decode": batch}
        else:
            found[f"{text} forward"] = batch * (length or 1)
    return found


def times_of(
    space: Space, rows: dict[str, int], device: str | torch.device | None, backend: str | None, track: Track = untracked
) -> list[dict[int, dict[str, float]]]:
    """Of each group, format's number -> phase -> seconds; {} of a group that is not timed."""
    shapes = [_shape(space.base, group) for group in space.groups]
    wanted = {shape: space.sizes[at].keys() for at, shape in enumerate(shapes) if shape is not None}
    known = {
        shape: _timed(shape, {n: space.formats[n] for n in numbers}, rows, device, backend)
        for shape, numbers in track(list(wanted.items()), "timing layers", len(wanted))
    }
    return [{} if shape is None else known[shape] for shape in shapes]


def _shape(program: Program, group: Group) -> Shape | None:
    nodes = [
        node for node in program.graph.find_nodes(op="call_function", target=LINEAR)
        if node.args[1].op == "get_attr" and node.args[1].target in group.weights
    ]  # fmt: skip
    if not nodes:
        return None
    weights = [program.constants[node.args[1].target] for node in nodes]
    has_bias = any(len(node.args) > 2 and node.args[2] is not None for node in nodes)
    return tuple(len(each) for each in weights), weights[0].shape[1], weights[0].dtype, has_bias


def _timed(
    shape: Shape, formats: dict[int, Format], rows: dict[str, int], device: str | torch.device | None, backend: str | None
) -> dict[int, dict[str, float]]:
    where = torch.device(device or "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = _Layers(shape).eval()
    program = capture(layers, (torch.zeros(4, shape[1], dtype=shape[2]),), check=False)
    modules = {}
    for number, form in formats.items():
        passes = tuple(map(_unlearned, form.passes))
        made, _ = run_passes(program, Context(), Options(passes, verify=False, allow_noop=True))
        modules[number] = runnable(lower(made, where, backend or "eager")[0], where, backend or "eager")
    found: dict[int, dict[str, float]] = {number: {} for number in formats}
    by_rows = {}
    for count in sorted(set(rows.values())):
        x = torch.randn(count, shape[1]).to(where, shape[2])
        by_rows[count] = _race(modules, x)
    for phase, count in rows.items():
        for number in formats:
            found[number][phase] = by_rows[count][number]
    return found


def _unlearned(of: PackLinears) -> PackLinears:
    """The same format without data: which numbers there are does not matter to the time."""
    usual = {"algorithm": "rtn", "criterion": "magnitude"}
    return replace(of, **{name: value for name, value in usual.items() if hasattr(of, name)})


@torch.no_grad()
def _race(modules: dict[int, nn.Module], x: Tensor) -> dict[int, float]:
    """The best of several calls of each, in turns."""
    for module in modules.values():
        module(x)
    best = dict.fromkeys(modules, float("inf"))
    began = time.perf_counter()
    for done in range(_CALLS):
        for number, module in modules.items():
            before = time.perf_counter()
            module(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            best[number] = min(best[number], time.perf_counter() - before)
        if done >= 2 and time.perf_counter() - began > _SECONDS * len(modules):
            break
    return best
