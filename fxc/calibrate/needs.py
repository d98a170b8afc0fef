"""What a run over calibration data takes of memory, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc.calibrate.blocks import Block
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.runner import Finish
from fxc.calibrate.stages import Statistic, Unit, float_bytes, planned, reads_both, widths
from fxc.calibrate.stream import alive_before
from fxc.errors import ResourceError
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.memory import available

# So many copies of a weight in float32 the algorithms take at a time, besides three of its statistics.
_WORK = 8
# And training so many of the weights of a block: what it moves, its gradient and the best so far, what goes through rounding.
_TRAINING = 8


@dataclass(frozen=True)
class Needs:
    """Bytes, besides the program and its samples. states: the hidden states of all samples where they are largest, as if they
    had nothing in common; statistics: the most at one time; block: the values of one sample in one block; work: what computing
    on a layer takes; result: the compressed weights; stages: of each, the names of its layers and the bytes of its
    statistics; on_disk: whether the hidden states are there; training: what training the layers of a block takes at its end,
    where statistics and work are no more."""

    states: int
    statistics: int
    block: int
    work: int
    stages: list[tuple[list[str], int]]
    result: int = 0
    on_disk: bool = False
    training: int = 0

    @property
    def total(self) -> int:
        """Of memory."""
        learning = max(self.statistics + self.block + self.work, self.training)
        return (0 if self.on_disk else self.states) + learning + self.result

    def __str__(self) -> str:
        disk = " on disk" if self.on_disk else ""
        parts = {
            f"of hidden states{disk}": self.states, "of statistics": self.statistics, "for a block": self.block,
            "to work on a layer": self.work, "of compressed weights": self.result,
        }  # fmt: skip
        said = [f"{nbytes / 1e6:.1f} MB {what}" for what, nbytes in parts.items()]
        trained = f", or {self.training / 1e6:.1f} MB to train a block" if self.training else ""
        return f"{', '.join(said[:-1])} and {said[-1]}{trained}: {self.total / 1e6:.1f} MB of memory"

    def check(self, where: str, lighter: str | None = None) -> None:
        """Raises `ResourceError` where there is not so much memory. where: what needs it; lighter: the option that
        makes do with smaller statistics."""
        left = available()
        if left is None or self.total <= left:
            return
        states = "fewer or shorter samples (--calib-samples, --calib-length), or --calib-disk DIR for the hidden states"
        fewer = f"{lighter}, which needs less, or only= for some layers" if lighter else "only= for some layers at a time"
        ways = {
            fewer: max(self.statistics + self.work, self.training),
            states: 0 if self.on_disk else self.states,
            "shorter samples (--calib-length)": self.block,
            "a machine with more memory": self.result,
        }
        raise ResourceError(
            f"what it learns needs {self.total / 1e9:.2f} GB of memory and {left / 1e9:.2f} GB are left",
            where=where,
            why=self,
            hint="; or ".join(sorted(filter(ways.get, ways), key=ways.get, reverse=True)[:2]),
        )


def needs_of(
    program: Program,
    layers: Collection[fx.Node],
    samples: Sequence[Sequence[Tensor]],
    statistic: Callable[[int], Statistic] = Hessian,
    result: int = 0,
    finish: Finish | None = None,
) -> Needs:
    """What `runner.run` with these arguments will take; `finish` is to train the weights of a block, sample by sample. result:
    bytes of what layers become. Of a size that depends on data nothing is known: it counts as 1."""
    found, stages = planned(program, layers)
    last = stages[-1].block if stages else 0
    known = [symbols_of(program, sample) for sample in samples]
    ends = [alive_before(program, block.nodes[0]) for block in found[1 : last + 1]]
    ends = [[node.meta["val"] for node in end if node.op != "placeholder"] for end in ends]
    states = [sum(nbytes_of(value, symbols) for value in end for symbols in known) for end in ends]
    streams = 2 if finish or reads_both(statistic) else 1
    costs = {unit: _cost(program, unit, statistic) for stage in stages for unit in stage.readers}
    alive = [sum(cost for unit, cost in costs.items() if unit.at[0] <= at <= unit.at[-1]) for at in range(len(stages))]
    names = [list(dict.fromkeys(layer_at(program, each) for u in stage.readers for each in u.layers)) for stage in stages]
    largest = max(samples, key=lambda sample: sum(each.numel() for each in sample), default=None)
    within = [_within(block, symbols_of(program, largest)) for block in found[: last + 1]] if samples else []
    work = [_WORK * float_bytes(program, unit) + 3 * cost // len(widths(program, unit)) for unit, cost in costs.items()]
    training = [0]
    if finish and samples:
        closing = {stage.block: at for at, stage in enumerate(stages)}
        pending = {block: sum(costs[u] for u in costs if u.at[0] <= at < u.at[-1]) for block, at in closing.items()}
        symbols = symbols_of(program, largest)
        training = [_training(program, found[block], layers, symbols) + kept for block, kept in pending.items()]
    return Needs(
        streams * max(states, default=0), max(alive, default=0), max(within, default=0), max(work, default=0),
        list(zip(names, alive)), result, training=max(training),
    )  # fmt: skip


def symbols_of(program: Program, sample: Sequence[Tensor]) -> dict[Any, int]:
    """Of the symbols in the shapes of the program's inputs, their values for this sample."""
    found = {}
    for node, tensor in zip(program.placeholders, sample, strict=True):
        for size, given in zip(node.meta["val"].shape, tensor.shape):
            if not isinstance(size, int):
                found[size.node.expr] = given
    return found


def nbytes_of(value: Any, symbols: dict[Any, int]) -> int:
    if isinstance(value, tuple | list):
        return sum(nbytes_of(each, symbols) for each in value)
    if not isinstance(value, Tensor):
        return 0
    sizes = [size if isinstance(size, int) else size.node.expr.xreplace(symbols) for size in value.shape]
    return value.element_size() * math.prod(int(size) if not getattr(size, "free_symbols", ()) else 1 for size in sizes)


def _within(block: Block, symbols: dict[Any, int]) -> int:
    """Bytes of what the block computes of one sample, where most of it is alive; a view counts as a copy."""
    inside = set(block.nodes)
    last = {each: node for node in block.nodes for each in node.all_input_nodes if each in inside}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for each, node in last.items():
        if all(user in inside for user in each.users):
            ending.setdefault(node, []).append(each)
    sizes = {node: nbytes_of(node.meta["val"], symbols) for node in block.nodes}
    now = most = 0
    for node in block.nodes:
        now += sizes[node]
        most = max(most, now)
        now -= sum(sizes[each] for each in ending.get(node, ()))
    return most


def _training(program: Program, block: Block, layers: Collection[fx.Node], symbols: dict[Any, int]) -> int:
    """Bytes of training the weights of the block's `layers`, matrices: of these, and of all that one sample gives in the block,
    with gradients, beside what it gave."""
    wanted = set(layers)
    weights = {node.args[1].target for node in block.nodes if node in wanted}
    numbers = sum(program.constants[name].numel() for name in weights if program.constants[name].ndim == 2)
    values = sum(nbytes_of(node.meta["val"], symbols) for node in block.nodes if node.op == "call_function")
    return _TRAINING * 4 * numbers + 2 * values + _within(block, symbols)


def _cost(program: Program, unit: Unit, statistic: Callable[[int], Statistic]) -> int:
    with FakeTensorMode():
        made = [statistic(width) for width in widths(program, unit)]
    return sum(each.nbytes for one in made for each in vars(one).values() if isinstance(each, Tensor))
