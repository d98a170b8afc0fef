"""Go through a program block by block, compress the layers of each, let what they give flow on: one block's memory at a time.

Stages are taken in the order in which they run: what a stage reads is computed sample by sample from the hidden states at its
block's begin, with all layers before it already compressed, and added up; then its layers are compressed, in place. At the end
of a block the hidden states of all samples are propagated, and the old ones freed. Where a statistic is of two streams, those
of the program as it was flow beside them. No random numbers are drawn. Several processes share the samples: what each has
counted is added up before layers are compressed, in each of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxc import ranks
from fxc.calibrate.blocks import Block
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.journal import Journal
from fxc.calibrate.stages import Stage, Statistic, Unit, float_bytes, planned, reads_both, units_of, widths
from fxc.calibrate.stream import Passage, State, Stream
from fxc.errors import InputRefused
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.progress import Pace, Track, untracked
from fxc.schemes.ops import GROUPED_LINEAR

Compress = Callable[[list[fx.Node], list[Statistic]], Any]
"""Is given layers and the statistics of what they read: one, or one for each expert of a mixture, empty (`rows` is 0) where no
row came. Replaces the layers in the program (`edit.call`), or leaves them. The statistics are freed afterwards. What it returns
(tensors, numbers, text, lists and dicts of them) is what a `Restore` needs to do the same again; of a dict the entry "errors"
is shown: of layers, the errors of their outputs as shares of the energy."""
Restore = Callable[[list[fx.Node], Any], None]
Finish = Callable[[Passage], Any]
"""Is given a block all of whose layers were given to `Compress`, and may change the constants that this put in. What it returns
is for a `Restore`, which is given no layers with it."""
Reads = dict[Unit, list[Tensor]]
"""Of each unit a value, and of experts the ends of their rows."""


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
    found, stages = planned(program, layers)
    # Training goes from sample to sample, and a journal holds the hidden states of all.
    is_shared = ranks.count() > 1 and finish is None and journal is None
    samples = ranks.share(samples) if is_shared else samples
    stream, plain, twins = Stream(program, samples), None, {}
    both = reads_both(statistic)
    if both or finish:
        plain = Stream(program.copy(), samples)
        twins = dict(zip(program.graph.nodes, plain.program.graph.nodes, strict=True))
    block, before = 0, None
    ends = [[unit for unit in stage.readers if unit.at[-1] == number] for number, stage in enumerate(stages)]
    pace = Pace([sum(float_bytes(program, unit) for unit in ending) for ending in ends], journal.began if journal else 0)
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
            unit.statistics = unit.statistics or [statistic(width) for width in widths(program, unit)]
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
        for each in (each for unit in ending for each in unit.statistics if is_shared):
            each.meet()
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


def _pending(stages: list[Stage]) -> dict[int, list[dict[str, Any]]] | None:
    """The statistics to which later stages will add, by the unit's number."""
    found = {at: [vars(each) for each in unit.statistics] for at, unit in enumerate(units_of(stages)) if unit.statistics}
    return found or None


def _take_up(
    program: Program,
    stages: list[Stage],
    statistic: Callable[[int], Statistic],
    pending: dict[int, list[dict[str, Any]]],
) -> None:
    units = units_of(stages)
    for at, saved in pending.items():
        units[at].statistics = [statistic(width) for width in widths(program, units[at])]
        for each, values in zip(units[at].statistics, saved, strict=True):
            vars(each).update(values)


def _reader(stream: Stream, layers: dict[Unit, fx.Node]) -> Callable[[State], Reads]:
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


def _replace(unit: Unit, stream: Stream, replace: Callable[[], Any]) -> Any:
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
