"""Latency of several models in one process: their calls take turns, so that noise of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxc.compiled.model import compiled_model
from fxc.compiler import load
from fxc.data.samples import has_length, sample_of_size
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.ir.cache import is_causal_lm, is_past
from fxc.ir.program import Program
from fxc.ir.structure import unflatten
from fxc.progress import Track, untracked
from fxc.source.load import kind_of, load_source

_CALLS = 3


@dataclass(frozen=True)
class Entry:
    """A model to time. how: what runs it, in words; program: from which its inputs follow; nbytes: of its weights."""

    name: str
    how: str
    model: nn.Module
    program: Program
    nbytes: int

    @property
    def is_causal(self) -> bool:
        return is_causal_lm(self.program)


@dataclass
class Row:
    """One entry at one size. milliseconds: phase ("prefill", "decode" for a token, or "forward") -> one number for
    each round."""

    entry: Entry
    batch: int
    seq: int | None
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, phase: str) -> float:
        return statistics.median(self.milliseconds[phase])

    def speedup(self, phase: str, baseline: Row) -> float:
        """The median over the rounds of how many times faster than `baseline` it was."""
        pairs = zip(baseline.milliseconds[phase], self.milliseconds[phase], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


_CACHES = {None: "", True: ", static cache", False: ", growing cache"}


def entries_of(
    source: str,
    *,
    backend: str = "eager",
    device: str | None = None,
    dtype: str = "auto",
    static_cache: bool | None = None,
    keep_compressed: bool = False,
    keep_float: float | None = None,
) -> list[Entry]:
    """What `source` is timed as: an artifact as fxc runs it; anything else as its own code runs it in eager mode and,
    with a backend that compiles, also uncompressed through that backend, so that compression is not credited with it.

    static_cache, keep_compressed, keep_float: see `fxc.load`; of artifacts.
    """
    name = Path(source).name if Path(source).is_dir() else source
    if kind_of(source) == "artifact":
        model = load(
            source, device=device, backend=backend, static_cache=static_cache, keep_compressed=keep_compressed,
            keep_float=keep_float,
        )  # fmt: skip
        how = f"fxc {backend}" + _CACHES[static_cache] + ", kept compressed" * keep_compressed
        how += "" if keep_float is None else f", keep_float={keep_float:g}"
        return [Entry(name, how, model, model.program, model.program.nbytes())]
    loaded = load_source(source, dtype=dtype, device=device)
    program = capture(loaded.model, loaded.example_inputs, check=False)
    found = [Entry(name, "torch eager", loaded.model, program, program.nbytes())]
    if backend != "eager":
        config = getattr(loaded.model, "config", None)
        plain = compiled_model(program, {}, config=config, device=device, backend=backend)
        found.append(Entry(name, f"fxc {backend}, not compressed", plain, program, program.nbytes()))
    return found


def race(
    entries: Sequence[Entry],
    batches: Sequence[int],
    lengths: Sequence[int],
    *,
    new: int = 16,
    rounds: int = 7,
    device: str | None = None,
    track: Track = untracked,
) -> list[Row]:
    """`race_at` every batch with every length."""
    pairs = [(batch, length) for batch in batches for length in (lengths if takes_lengths(entries[0].program) else [None])]
    return race_at(entries, pairs, new=new, rounds=rounds, device=device, track=track)


def takes_lengths(program: Program) -> bool:
    """Whether it takes sequences, so that a size is a batch and a length, and not a batch alone."""
    return any(has_length(node.meta["val"]) for node in program.placeholders)


def race_at(
    entries: Sequence[Entry],
    sizes: Sequence[tuple[int, int | None]],
    *,
    new: int = 16,
    rounds: int = 7,
    device: str | None = None,
    track: Track = untracked,
) -> list[Row]:
    """Time every entry at every size: in each round each is called in turn, every other round in reverse. sizes: batch and
    length, None for a model that takes no sequences. The rows are in the order of sizes, then of entries.

    new: how many tokens a causal language model generates after each prompt; track: shows progress.
    Raises `UsageError` when the entries do not take the same inputs or the sizes are not ones that a model takes.
    """
    first = entries[0]
    for entry in entries[1:]:
        # A pruned decoder may have a smaller cache, or none in some layers.
        a, b = ([i.name for i in e.program.signature.inputs if not is_past(i.name)] for e in (first, entry))
        if a != b:
            raise UsageError(f"{entry.name} and {first.name} do not take the same inputs", why=f"{b} and {a}")
    if min([*(n for size in sizes for n in size if n is not None), new, rounds]) < 1:
        raise UsageError("sizes, tokens and rounds must be at least 1")
    rows, calls = [], []
    for batch, seq in sizes:
        tensors = _inputs(first, batch, seq, new, device)
        for entry in entries:
            rows.append(Row(entry, batch, seq))
            calls.append(_decoder(entry, tensors[0], new) if entry.is_causal else _forward(entry, tensors))
    with torch.inference_mode():
        for call in track(calls, "warming up", len(calls)):
            call()
        for number in track(range(rounds), f"timing {len(entries)} models in turns", rounds):
            order = range(len(rows)) if number % 2 == 0 else reversed(range(len(rows)))
            for i in order:
                for phase, spent in calls[i]().items():
                    rows[i].milliseconds.setdefault(phase, []).append(spent * 1e3)
    return rows


def _inputs(entry: Entry, batch: int, seq: int | None, new: int, device: str | None) -> list[Tensor]:
    config = getattr(entry.model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    total = (seq or 0) + (new if entry.is_causal else 0)
    if longest and total > longest:
        raise UsageError(f"{entry.name} takes at most {longest} tokens, not {total}", hint="--seq N, --new N")
    return [tensor.to(device or "cpu") for tensor in sample_of_size(entry.program, batch, seq)]


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _forward(entry: Entry, tensors: list[Tensor]) -> Callable[[], dict[str, float]]:
    structure = entry.program.signature.call
    args = [unflatten(a, tensors) for a in structure["args"]]
    kwargs = {k: unflatten(a, tensors) for k, a in structure["kwargs"].items()}

    def once() -> dict[str, float]:
        spent = []
        for _ in range(_CALLS):
            before = _now(tensors[0])
            entry.model(*args, **kwargs)
            spent.append(_now(tensors[0]) - before)
        return {"forward": statistics.median(spent)}

    return once


def _decoder(entry: Entry, ids: Tensor, new: int) -> Callable[[], dict[str, float]]:
    """Prefill of the prompt, and the mean over `new` tokens decoded after it: the same tokens for every entry."""
    batch, length = ids.shape
    mask = torch.ones(batch, length + new, dtype=torch.int64, device=ids.device)

    def prefill() -> Any:
        cache = entry.model.new_cache(len(ids)) if hasattr(entry.model, "new_cache") else None
        return entry.model(input_ids=ids, attention_mask=mask[:, :length], past_key_values=cache, use_cache=True)

    def once() -> dict[str, float]:
        spent = []
        for _ in range(_CALLS):
            before = _now(ids)
            output = prefill()
            spent.append(_now(ids) - before)
        before = _now(ids)
        for step in range(new):
            output = entry.model(
                input_ids=ids[:, :1],
                attention_mask=mask[:, : length + step + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        return {"prefill": statistics.median(spent), "decode": (_now(ids) - before) / new}

    return once
