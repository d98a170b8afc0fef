"""In which order the layers of a program are compressed, and which of them together.

Layers that read the same value are a stage, and share one statistic. A weight that several layers read, because a module runs
twice or names are tied, is compressed once, at the last of them, by the statistics of all: the layers between run with that
weight as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import fx

from fxc.calibrate.blocks import Block, blocks
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.ranges import Range
from fxc.ir.program import Program
from fxc.schemes.ops import GROUPED_LINEAR

Statistic = Hessian | Squares | Range


@dataclass(eq=False)
class Unit:
    """Layers that are compressed together. at: the stages that some of them are in; statistics: [] before the first."""

    layers: list[fx.Node] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """block: its number; readers: of each unit that reads the stage's value, one layer that does."""

    block: int
    readers: dict[Unit, fx.Node]


def planned(program: Program, layers: Collection[fx.Node]) -> tuple[list[Block], list[Stage]]:
    """The blocks, and the stages in which `layers` are compressed."""
    found, wanted = blocks(program), set(layers)
    groups = [(at, [n for n in group if n in wanted]) for at, block in enumerate(found) for group in block.groups]
    groups = [(at, group) for at, group in groups if group]
    places: dict[str, set[int]] = {}
    for number, (_, group) in enumerate(groups):
        for layer in group:
            places.setdefault(layer.args[1].target, set()).add(number)
    units: dict[object, Unit] = {}
    stages = []
    for number, (at, group) in enumerate(groups):
        readers: dict[Unit, fx.Node] = {}
        for layer in group:
            weight = layer.args[1].target
            # Experts read their own rows of the value, which other layers read whole.
            here = (number, layer.args[2] if layer.target is GROUPED_LINEAR else None)
            unit = units.setdefault(weight if len(places[weight]) > 1 else here, Unit())
            unit.layers.append(layer)
            unit.at.append(number)
            readers.setdefault(unit, layer)
        stages.append(Stage(at, readers))
    return found, stages


def units_of(stages: list[Stage]) -> list[Unit]:
    return list(dict.fromkeys(unit for stage in stages for unit in stage.readers))


def widths(program: Program, unit: Unit) -> list[int]:
    """How many channels its layers read, once, or once for each expert."""
    layer = unit.layers[0]
    weight = program.constants[layer.args[1].target]
    # A weight that is packed as 2:4 has fewer columns than its layer reads.
    width = layer.args[0].meta["val"].shape[-1] if weight.ndim == 2 else weight.shape[-1]
    return [width] * (len(weight) if layer.target is GROUPED_LINEAR else 1)


def reads_both(statistic: Callable[[int], Statistic]) -> bool:
    return getattr(statistic(1), "cross", None) is not None


def float_bytes(program: Program, unit: Unit) -> int:
    """Bytes of the unit's largest weight in float32, of experts of one."""
    weights = (program.constants[layer.args[1].target] for layer in unit.layers)
    return 4 * max(math.prod(weight.shape[-2:]) for weight in weights)
