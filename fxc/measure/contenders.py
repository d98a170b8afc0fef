"""What a model costs and how good it is, the same way for an original and for whatever was made of it: bytes on disk, bytes
that it holds when it is loaded, latency at chosen sizes, quality.

    evaluation = evaluation_of(captured, "heldout.txt")
    found = measure([original_contender(source, captured), artifact("int8", folder)], sizes_of("1x128,8x512"), evaluation)
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxc.analysis.sizes import on_disk
from fxc.captured import Captured, part_of
from fxc.compiled.model import CompiledModel
from fxc.compiler import load
from fxc.errors import UsageError
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.measure.bench import Entry, Row, race_at, takes_lengths
from fxc.measure.quality import Evaluation, Quality
from fxc.progress import Track, untracked
from fxc.source.load import load_source

Size = tuple[int, int | None]
"""Batch, and length where the model takes sequences."""

NEW, ROUNDS = 32, 7
_SIZE = re.compile(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?")


@dataclass(frozen=True)
class Contender:
    """A model to measure. entry: the model, and what runs it; disk_bytes: of the files that make it run."""

    entry: Entry
    disk_bytes: int

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def held_bytes(self) -> int:
        return held_bytes(self.entry.model)


@dataclass(frozen=True)
class Latency:
    """At one size, of one phase: "prefill" of a prompt, "decode" of a token after it, or "forward". rounds: milliseconds, in
    the order of the rounds, which all contenders share."""

    batch: int
    length: int | None
    phase: str
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which the middle half of the rounds lies."""
        if len(self.rounds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def share_of(self, baseline: Latency) -> float:
        """The median over the rounds of this latency as a share of `baseline`'s in the same round."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.rounds, baseline.rounds, strict=True))

    @property
    def size(self) -> str:
        return size_text((self.batch, self.length))

    def as_json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {"batch": self.batch, "length": self.length, "phase": self.phase, "median_ms": self.median,
                "quartiles_ms": [low, high], "rounds_ms": self.rounds}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A contender's numbers. latencies: in the order of the sizes, prefill before decode; quality: None where it was not asked
    for."""

    name: str
    how: str
    disk_bytes: int
    held_bytes: int
    latencies: list[Latency] = field(default_factory=list)
    quality: Quality | None = None


def original_contender(
    source: str, captured: Captured, *, dtype: str = "auto", device: str | None = None, revision: str | None = None,
    trust_remote_code: bool = False, part: str | None = None,
) -> Contender:  # fmt: skip
    """A source that is no artifact as it comes: its own code in eager mode. The module that was captured is taken where it was
    kept, and else it is loaded again. disk_bytes: of its weights, as they came."""
    if captured.module is not None:
        return as_it_comes(captured, device)
    loaded = load_source(source, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    module, _ = part_of(loaded.model, part)
    return _as_it_comes(module, captured)


def as_it_comes(captured: Captured, device: str | None = None) -> Contender:
    """The module that was captured (`capture_source(keep_module=True)`), in eager mode."""
    module = captured.module
    if module.training or torch.device(device or "cpu").type != "cpu":
        module = copy.deepcopy(module).eval().to(device or "cpu")
    return _as_it_comes(module, captured)


def _as_it_comes(module: nn.Module, captured: Captured) -> Contender:
    entry = Entry("original", "torch eager", module, captured.program, captured.program.nbytes())
    return Contender(entry, captured.nbytes)


def artifact(
    name: str, folder: str | Path, *, backend: str = "eager", device: str | None = None, keep_compressed: bool = False
) -> Contender:
    """An artifact as `fxc.load` gives it."""
    made = load(folder, device=device, backend=backend, keep_compressed=keep_compressed)
    return compiled(name, made, on_disk(Path(folder)))


def compiled(name: str, model: CompiledModel, disk_bytes: int) -> Contender:
    """A compiled model. disk_bytes: of its artifact (`fxc.analysis.sizes.on_disk`)."""
    how = f"fxc {model.backend}" + ", kept compressed" * model.keep_compressed
    return Contender(Entry(name, how, model, model.program, model.program.nbytes()), disk_bytes)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that a loaded model computes with: of a compiled one the constants of what the device runs, packed weights
    and each form in which a layer is kept for some numbers of rows; of another one its parameters and buffers. What the
    libraries and a call take besides is not in it."""
    if isinstance(model, CompiledModel):
        tensors = model.lowered.constants.values()
    else:
        tensors = [*model.parameters(), *model.buffers()]
    # A packed weight of oneDNN has no address, and is no other's.
    found = {(t.data_ptr(), t.numel()) if t.layout == torch.strided else id(t): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in found.values())


def sizes_of(text: str) -> list[Size]:
    """ "1x128,8x512" -> [(1, 128), (8, 512)]; "1,8" -> [(1, None), (8, None)]. Raises `UsageError`."""
    found = [_SIZE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        hint = "batch x length, as in 1x128,8x512; or batches alone, as in 1,8"
        raise UsageError(f"{text!r} is no list of sizes", where="sizes", hint=hint)
    return list(dict.fromkeys((int(each[1]), int(each[2]) if each[2] else None) for each in found))


def size_text(size: Size) -> str:
    batch, length = size
    return f"{batch}" if length is None else f"{batch}x{length}"


def sizes_for(program: Program, given: Sequence[Size] = (), longest: int | None = None, new: int = NEW) -> list[Size]:
    """The sizes to time a model at: those given, or 1x128 of a language model, 1x128 and 8x128 of another that takes sequences,
    1 and 8 of any other. longest: the most tokens that it takes; new: how many a language model generates after a prompt.
    Raises `UsageError` for sizes of another kind, and lengths that it does not take."""
    sequences, room = takes_lengths(program), new if is_causal_lm(program) else 0
    if not given:
        usual = min(128, max(1, (longest or 128 + room) - room))
        return ([(1, usual)] if room else [(1, usual), (8, usual)]) if sequences else [(1, None), (8, None)]
    wrong = [size_text(size) for size in given if (size[1] is None) is sequences]
    if wrong:
        hint = "batch x length, as in 1x128,8x512" if sequences else "batches alone, as in 1,8: this model takes no sequences"
        raise UsageError(f"{wrong[0]} is no size of this model", where="sizes", hint=hint)
    if longest and sequences and (most := max(length for _, length in given) + room) > longest:
        hint = "shorter ones, or less --new"
        raise UsageError(f"the model takes at most {longest} tokens, not {most}", where="sizes", hint=hint)
    return list(given)


def timed(
    contenders: Sequence[Contender], sizes: Sequence[Size], *, new: int = NEW, rounds: int = ROUNDS, device: str | None = None,
    track: Track = untracked,
) -> list[list[Latency]]:  # fmt: skip
    """The latencies of each contender, all taken in turns: in each round each is called once at each size, every other round in
    reverse."""
    rows = race_at([each.entry for each in contenders], sizes, new=new, rounds=rounds, device=device, track=track)
    return [_latencies(rows[place :: len(contenders)]) for place in range(len(contenders))]


def _latencies(rows: Sequence[Row]) -> list[Latency]:
    return [Latency(row.batch, row.seq, phase, spent) for row in rows for phase, spent in row.milliseconds.items()]


def measure(
    contenders: Sequence[Contender], sizes: Sequence[Size], evaluation: Evaluation | None = None, *, new: int = NEW,
    rounds: int = ROUNDS, device: str | None = None, track: Track = untracked,
) -> list[Measured]:  # fmt: skip
    """All numbers of each contender; without an evaluation no quality."""
    latencies = timed(contenders, sizes, new=new, rounds=rounds, device=device, track=track)
    return [
        Measured(
            each.name, each.entry.how, each.disk_bytes, each.held_bytes, spent,
            evaluation.measure(each.entry.model, track) if evaluation else None,
        )
        for each, spent in zip(contenders, latencies, strict=True)
    ]  # fmt: skip
