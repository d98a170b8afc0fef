"""Go through a program block by block, compress the layers of each, let what they give flow on: one block's memory at a time.

Layers that read the same value are a stage, and share one statistic. Stages are taken in the order in which they run: what a
stage reads is computed sample by sample from the hidden states at its block's begin, with all layers before it already
compressed, and added up; then its layers are compressed, in place. At the end of a block the hidden states of all samples are
propagated, and the old ones freed. Where a statistic is of two streams, those of the program as it was flow beside them.

A weight that several layers read, because a module runs twice or names are tied, is compressed once, at the last of them, by
the statistics of all: the layers between run with that weight as it was. No random numbers are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc.calibrate.blocks import Block, blocks
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.journal import Journal
from fxc.calibrate.needs import Needs
from fxc.calibrate.ranges import Range
from fxc.calibrate.stream import Passage, State, Stream, alive_before
from fxc.errors import InputRefused
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.progress import Pace, Track, untracked
from fxc.schemes.ops import GROUPED_LINEAR

Statistic = Hessian | Squares | Range
# So many copies of a weight in float32 the algorithms take at a time, besides three of its statistics.
_WORK = 8
Compress = Callable[[list[fx.Node], list[Statistic]], Any]
"""Is given layers and the statistics of what they read: one, or one for each expert of a mixture, empty (`rows` is 0) where no
row came. Replaces the layers in the program (`edit.call`), or leaves them. The statistics are freed afterwards. What it returns
(tensors, numbers, text, lists and dicts of them) is what a `Restore` needs to do the same again; of a dict the entry "errors"
is shown: of layers, the errors of their outputs as shares of the energy."""
Restore = Callable[[list[fx.Node], Any], None]
Finish = Callable[[Passage], Any]
"""Is given a block all of whose layers were given to `Compress`, and may change the constants that this put in. What it returns
is for a `Restore`, which is given no layers with it."""


@dataclass(eq=False)
class _Unit:
    """Layers that are compressed together. at: the stages that some of them are in; statistics: [] before the first."""

    layers: list[fx.Node] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)


Reads = dict[_Unit, list[Tensor]]
"""Of each unit a value, and of experts the ends of their rows."""


@dataclass(frozen=True)
class _Stage:
    """block: its number; readers: of each unit that reads the stage's value, one layer that does."""

    block: int
    readers: dict[_Unit, fx.Node]


def needs(
    program: Program,
    layers: Collection[fx.Node],
    samples: Sequence[Sequence[Tensor]],
    statistic: Callable[[int], Statistic] = Hessian,
    result: int = 0,
    finish: Finish | None = None,
) -> Needs:
    """What `run` with these arguments will take, without what `finish` does. result: bytes of what layers become. Of a size
    that depends on data nothing is known: it counts as 1."""
    found, stages = _planned(program, layers)
    last = stages[-1].block if stages else 0
    known = [symbols_of(program, sample) for sample in samples]
    ends = [alive_before(program, block.nodes[0]) for block in found[1 : last + 1]]
    ends = [[node.meta["val"] for node in end if node.op != "placeholder"] for end in ends]
    states = [sum(nbytes_of(value, symbols) for value in end for symbols in known) for end in ends]
    streams = 2 if finish or _reads_both(statistic) else 1
    costs = {unit: _cost(program, unit, statistic) for stage in stages for unit in stage.readers}
    alive = [sum(cost for unit, cost in costs.items() if unit.at[0] <= at <= unit.at[-1]) for at in range(len(stages))]
    names = [list(dict.fromkeys(layer_at(program, each) for u in stage.readers for each in u.layers)) for stage in stages]
    largest = max(samples, key=lambda sample: sum(each.numel() for each in sample), default=None)
    within = [_within(block, symbols_of(program, largest)) for block in found[: last + 1]] if samples else []
    work = [_WORK * _floats(program, unit) + 3 * cost // len(_widths(program, unit)) for unit, cost in costs.items()]
    return Needs(
        streams * max(states, default=0), max(alive, default=0), max(within, default=0), max(work, default=0),
        list(zip(names, alive)), result,
    )  # fmt: skip


@torch.no_grad()
def run(
    program: Program,
    layers: Collection[fx.Node],
    samples: Sequence[Sequence[Tensor]],
    compress: Compress,
    *,
    statistic: Callable[[int], Statistic] = Hessian,
    finish: Finish | None = None,
    track: Track = untracked,
    journal: Journal | None = None,
    restore: Restore | None = None,
) -> None:
    """Give `compress` the statistics of what each of `layers` reads: products of `program` with a constant, `aten.linear` or
    `fxc.grouped_linear`.

    samples: lists of the program's inputs. statistic: makes what inputs of so many channels are added up in; one with a `cross`
    is given what a layer reads and what it would read had nothing been compressed. Of experts it is given the former twice:
    their rows are not the same in both. finish: called at the end of each block with such layers. journal: where what is done
    is saved, and where the run goes on from what an earlier one with the same arguments saved; restore: needed for that.
    Raises InputRefused where a layer reads NaN or Inf.
    """
    found, stages = _planned(program, layers)
    stream, plain, twins = Stream(program, samples), None, {}
    both = _reads_both(statistic)
    if both or finish:
        plain = Stream(program.copy(), samples)
        twins = dict(zip(program.graph.nodes, plain.program.graph.nodes, strict=True))
    block, before = 0, None
    ends = [[unit for unit in stage.readers if unit.at[-1] == number] for number, stage in enumerate(stages)]
    pace = Pace([sum(_floats(program, unit) for unit in ending) for ending in ends], journal.began if journal else 0)
    for number, (stage, ending) in enumerate(zip(stages, ends)):
        while block < stage.block:
            block += 1
            after = found[block].nodes[0]
            streams = [(plain, twins[after], None)] if plain else []
            _flow([*streams, (stream, after, plain)], block, journal)
        is_last = number + 1 == len(stages) or stages[number + 1].block > block
        if journal and number < journal.began:
            saved = journal.stage(number)
            for unit, made in zip(ending, saved):
                _replace(unit, stream, partial(restore, unit.layers, made))
            for made in saved[len(ending) :]:
                restore([], made)
            if number == journal.began - 1:
                _take_up(program, stages, statistic, journal.pending() or {})
            continue
        for unit in stage.readers:
            unit.statistics = unit.statistics or [statistic(width) for width in _widths(program, unit)]
        names = ", ".join(dict.fromkeys(layer_at(program, layer) for layer in stage.readers.values()))
        read = _reader(stream, stage.readers)
        other = _reader(plain, {unit: twins[layer] for unit, layer in stage.readers.items()}) if both else None
        place = f"block {block + 1} of {len(found)}, {names} ({number + 1} of {len(stages)})"
        said = ", ".join(filter(None, (place, before, pace.left(number))))
        for at, state in enumerate(track(stream.states, said, len(samples))):
            try:
                _add(read(state), other(plain.states[at]) if both else None)
            except InputRefused as error:
                raise InputRefused(error.what, where=names, why=error.why, hint=error.hint) from None
        made = []
        for unit in ending:
            made.append(_replace(unit, stream, partial(compress, unit.layers, unit.statistics)))
            unit.statistics = []
        errors = [each for one in made if isinstance(one, dict) for each in one.get("errors", {}).values()]
        before = f"the error before {max(errors) ** 0.5:.1%}" if errors else None
        if finish and is_last and samples:
            made.append(finish(_passage(found[block], twins, plain, stream)))
        if journal:
            journal.save_stage(made, _pending(stages))
    if journal:
        journal.finish()


def _flow(streams: list[tuple[Stream, fx.Node, Stream | None]], block: int, journal: Journal | None) -> None:
    """Have the hidden states of each stream be those before `block`: let them flow on, or read what an earlier process wrote.
    streams: each with the first node of the block in it, and the one that flowed before it."""
    if journal is None:
        for stream, after, beside in streams:
            stream.flow(after, beside)
        return
    if block > journal.block:
        spills = []
        for at, (stream, after, beside) in enumerate(streams):
            with journal.spilling(block, at) as spill:
                stream.flow_to_disk(after, beside, spill, journal.in_memory)
            spills.append(spill)
            if not journal.in_memory:
                stream.from_disk(*journal.file(spill), in_memory=False)
        journal.keep_states(block, spills)
    elif block == journal.block and journal.states():
        for (stream, *_), (path, offsets) in zip(streams, journal.states(), strict=True):
            stream.from_disk(path, offsets, journal.in_memory)


def _pending(stages: list[_Stage]) -> dict[int, list[dict[str, Any]]] | None:
    """The statistics to which later stages will add, by the unit's number."""
    found = {at: [vars(each) for each in unit.statistics] for at, unit in enumerate(_units(stages)) if unit.statistics}
    return found or None


def _take_up(
    program: Program,
    stages: list[_Stage],
    statistic: Callable[[int], Statistic],
    pending: dict[int, list[dict[str, Any]]],
) -> None:
    units = _units(stages)
    for at, saved in pending.items():
        units[at].statistics = [statistic(width) for width in _widths(program, units[at])]
        for each, values in zip(units[at].statistics, saved, strict=True):
            vars(each).update(values)


def _units(stages: list[_Stage]) -> list[_Unit]:
    return list(dict.fromkeys(unit for stage in stages for unit in stage.readers))


def _planned(program: Program, layers: Collection[fx.Node]) -> tuple[list[Block], list[_Stage]]:
    """The blocks, and the stages in which `layers` are compressed."""
    found, wanted = blocks(program), set(layers)
    groups = [(at, [n for n in group if n in wanted]) for at, block in enumerate(found) for group in block.groups]
    groups = [(at, group) for at, group in groups if group]
    places: dict[str, set[int]] = {}
    for number, (_, group) in enumerate(groups):
        for layer in group:
            places.setdefault(layer.args[1].target, set()).add(number)
    units: dict[object, _Unit] = {}
    stages = []
    for number, (at, group) in enumerate(groups):
        readers: dict[_Unit, fx.Node] = {}
        for layer in group:
            weight = layer.args[1].target
            # Experts read their own rows of the value, which other layers read whole.
            here = (number, layer.args[2] if layer.target is GROUPED_LINEAR else None)
            unit = units.setdefault(weight if len(places[weight]) > 1 else here, _Unit())
            unit.layers.append(layer)
            unit.at.append(number)
            readers.setdefault(unit, layer)
        stages.append(_Stage(at, readers))
    return found, stages


def _widths(program: Program, unit: _Unit) -> list[int]:
    """How many channels its layers read, once, or once for each expert."""
    layer = unit.layers[0]
    weight = program.constants[layer.args[1].target]
    # A weight that is packed as 2:4 has fewer columns than its layer reads.
    width = layer.args[0].meta["val"].shape[-1] if weight.ndim == 2 else weight.shape[-1]
    return [width] * (len(weight) if layer.target is GROUPED_LINEAR else 1)


def _reads_both(statistic: Callable[[int], Statistic]) -> bool:
    return getattr(statistic(1), "cross", None) is not None


def _reader(stream: Stream, layers: dict[_Unit, fx.Node]) -> Callable[[State], Reads]:
    """What computes what the layer of each unit reads, from a sample's state."""
    sources = {
        unit: [layer.args[0], *layer.args[2:]] if layer.target is GROUPED_LINEAR else [layer.args[0]]
        for unit, layer in layers.items()
    }
    read = stream.reader(each for some in sources.values() for each in some)

    def reads(state: State) -> Reads:
        values = read(state)
        return {unit: [values[each] for each in some] for unit, some in sources.items()}

    return reads


def _add(reads: Reads, uncompressed: Reads | None) -> None:
    """Count in what one sample gives layers to read."""
    for unit, (x, *offsets) in reads.items():
        streams = [x]
        if uncompressed is not None:
            streams.append(x if offsets else uncompressed[unit][0])
        if not offsets:
            unit.statistics[0].add(*streams)
            continue
        ends = offsets[0].tolist()
        for expert, begin, end in zip(unit.statistics, [0, *ends], ends):
            expert.add(*(each[begin:end] for each in streams))


def _replace(unit: _Unit, stream: Stream, replace: Callable[[], Any]) -> Any:
    """What `replace` returns, which replaces the unit's layers."""
    # Where a hidden state is what a layer gave (its weight was read again later), it is from now on that of its successor.
    known = stream.states[0] if stream.states else ()
    held = [layer for layer in unit.layers if layer.users and layer in known]
    users = [next(iter(layer.users)) for layer in held]
    places = [user.all_input_nodes.index(layer) for user, layer in zip(users, held)]
    made = replace()
    for layer, user, place in zip(held, users, places):
        stream.rename(layer, user.all_input_nodes[place])
    return made


def _passage(block: Block, twins: Mapping[fx.Node, fx.Node], plain: Stream, stream: Stream) -> Passage:
    """The passage through `block`, before whose begin the streams are."""
    nodes = [twins[node] for node in block.nodes]
    inside, reached = set(nodes), {twins[layer] for group in block.groups for layer in group}
    for node in nodes:
        if any(each in reached for each in node.all_input_nodes):
            reached.add(node)
    leaves = twins.get(block.leaves)
    outputs = [leaves] if leaves else [node for node in dict.fromkeys(plain.program.results) if node in inside & reached]
    read = plain.reader(outputs)
    named = {node.name: node for node in plain.program.graph.nodes}

    def reads(at: int) -> State:
        return {named[node.meta.get("replaces", node.name)]: value for node, value in stream.states[at].items()}

    def gave(at: int) -> list[Tensor]:
        return list(read(plain.states[at]).values())

    return Passage(plain.program, nodes, len(stream.states), outputs, reads, gave)


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


def _floats(program: Program, unit: _Unit) -> int:
    """Bytes of the unit's largest weight in float32, of experts of one."""
    weights = (program.constants[layer.args[1].target] for layer in unit.layers)
    return 4 * max(math.prod(weight.shape[-2:]) for weight in weights)


def _cost(program: Program, unit: _Unit, statistic: Callable[[int], Statistic]) -> int:
    with FakeTensorMode():
        made = [statistic(width) for width in _widths(program, unit)]
    return sum(each.nbytes for one in made for each in vars(one).values() if isinstance(each, Tensor))
