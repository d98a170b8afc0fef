"""fxc.compare: several strategies on one model, measured side by side.

The model is captured once and data is read once; each strategy becomes an artifact in the output folder, and its quality is
measured (`making`). Then all are loaded and timed in turns. What is done is kept as it is done (`folder`), and a run that is
killed goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from fxc import memory
from fxc.captured import Captured, capture_source
from fxc.comparison import plots, table
from fxc.comparison.folder import Folder, check_folder, opened
from fxc.comparison.making import PACKAGES, Made, Maker
from fxc.comparison.request import Request
from fxc.comparison.result import Comparison, Row, reason
from fxc.comparison.strategies import ORIGINAL, parse_strategies
from fxc.errors import ResourceError, UsageError
from fxc.ir.digest import digest_of
from fxc.kernel_bench.cpu_platform import FLAGS
from fxc.kernel_bench.files import versions
from fxc.lower.remembered import cpu_name
from fxc.measure.contenders import (
    NEW,
    ROUNDS,
    Contender,
    Measured,
    Size,
    artifact,
    as_it_comes,
    held_bytes,
    sizes_for,
    sizes_of,
    timed,
)
from fxc.measure.quality import WINDOW as EVALUATED
from fxc.measure.quality import Evaluation, Quality, evaluation_of
from fxc.options import Keywords, Options
from fxc.progress import Say, Track, unsaid, untracked

# What a model takes when it is loaded, by the bytes of its weights' files: mapped, packed, and in a second form.
_ROOM = 3


def compare(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    strategies: str | Path | Iterable[str | Path] = "default",
    *,
    out: str | Path,
    data: Any = None,
    eval_samples: int | None = None,
    eval_length: int = EVALUATED,
    sizes: str = "",
    new: int = NEW,
    rounds: int = ROUNDS,
    threads: int | None = None,
    force: bool = False,
    track: Track = untracked,
    say: Say = unsaid,
    **options: Unpack[Keywords],
) -> Comparison:
    """Compile a model by each of several strategies, and measure all of them and the model as it comes side by side.

    model, example_inputs, options: as of `fxc.optimize`; `calib` and `train` are read once, and only what learns from them is
    given them. strategies: see `fxc.comparison.strategies`; one that the model does not allow, or that lacks data, is a row
    that says why. out: a folder for artifacts, tables and pictures; of an earlier run on the same model what is done is not
    done again, with `force` everything is. data: what quality is measured on, of the kinds of `calib`; None: heldout.txt in the
    model's folder, or else made-up inputs. eval_samples, eval_length: see `fxc.measure.quality.evaluation_of`. sizes:
    "1x128,8x512" or "1,8", to time at, by default by the kind of model; new: tokens that a language model generates after each
    prompt; rounds: how often each is timed. threads: of torch, while this runs.

    Raises `FxcError` for what is wrong with the model, the data or the folder; what is wrong with one strategy is in its row.
    """
    with _threads(threads):
        asked = Request(
            model, example_inputs, parse_strategies(strategies), Path(out), data, eval_samples, eval_length,
            sizes_of(sizes) if sizes else [], new, rounds, Options("", **options),
        )  # fmt: skip
        return _compare(asked.checked(), force, track, say)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and count < 1:
        raise UsageError(f"{count} threads", where="threads", hint="at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(request: Request, force: bool, track: Track, say: Say) -> Comparison:
    check_folder(request.out, request.folder)
    say(f"capturing {request.name} ...")
    options = replace(request.options, calib=None, train=None)
    captured = capture_source(request.model, request.example_inputs, options, keep_module=True)
    evaluation = evaluation_of(
        captured, request.found if request.data is None else request.data, samples=request.eval_samples,
        window=request.eval_length, seed=request.options.seed, track=track,
    )  # fmt: skip
    sizes = sizes_for(captured.program, request.sizes, _longest(captured), request.new)
    conditions = _conditions(request, sizes)
    program = digest_of(captured.program.constants.values(), str(captured.program))
    with opened(request.out, {"program": program, "name": request.name}, request.folder, force=force) as folder:
        original = _original(request, captured, program, evaluation, folder, track, say)
        made, left = Maker(request, captured, program, evaluation, folder, track, say).all()
        timing = _Timing(request, sizes, folder, track)
        count = sum(each.quality is not None for each in made)
        say(f"loading {count} artifacts and timing them in turns{f', {left}' if left else ''} ...")
        rows = timing.rows(original, made)
        comparison = Comparison(request.name, evaluation.data, request.found is not None, conditions, rows)
        drawn = plots.pictures(comparison)
        if drawn is None:
            comparison.notes.append(plots.MISSING)
        for name, picture in (drawn or {}).items():
            folder.write_file(name, picture)
        folder.write_file("compare.md", table.markdown(comparison, list(drawn or {})))
        folder.write_file("compare.json", json.dumps(comparison.as_json(), indent=1, allow_nan=False) + "\n")
    return comparison


def _original(
    request: Request, captured: Captured, program: str, evaluation: Evaluation, folder: Folder, track: Track, say: Say
) -> tuple[Contender, Quality] | None:
    """The model as it comes, where it is no artifact."""
    if captured.module is None:
        return None
    contender = as_it_comes(captured, request.options.device)
    key = {"program": program, "evaluation": evaluation.digest, "versions": versions(PACKAGES)}
    entry = folder.read(ORIGINAL) or {}
    quality = Quality.from_whole(entry.get("quality")) if entry.get("key") == key else None
    if quality is None:
        say("the model as it comes ...")
        quality = evaluation.measure(contender.entry.model, track)
        folder.write(ORIGINAL, {"key": key, "quality": quality.whole()})
    return contender, quality


@dataclass(frozen=True)
class _Timing:
    """Loads what was made and times it in turns."""

    request: Request
    sizes: list[Size]
    folder: Folder
    track: Track

    def rows(self, original: tuple[Contender, Quality] | None, made: Sequence[Made]) -> list[Row]:
        contenders, qualities = [], []
        if original is not None:
            contenders, qualities = [original[0]], [original[1]]
        for each in made:
            if each.quality is not None:
                contenders.append(self._loaded(each, len(contenders)))
                qualities.append(each.quality)
        if not contenders:
            why = "; ".join(f"{each.strategy.text}: {reason(each.why_not)}" for each in made)
            raise UsageError("none of the strategies can be carried out", where=self.request.name, why=why)
        latencies = timed(
            contenders, self.sizes, new=self.request.new, rounds=self.request.rounds, device=self.request.options.device,
            track=self.track,
        )  # fmt: skip
        measured = iter(
            (each, Measured(each.name, each.entry.how, each.disk_bytes, held_bytes(each.entry.model), spent, quality))
            for each, spent, quality in zip(contenders, latencies, qualities, strict=True)
        )
        first = qualities[0]
        rows = [Row(ORIGINAL, [], measured=next(measured)[1], loss=first.loss_against(first))] if original is not None else []
        for each in made:
            passes = [str(p) for p in each.strategy.passes]
            if each.quality is None:
                rows.append(Row(each.strategy.text, passes, why_not=each.why_not, reused=each.reused))
                continue
            contender, numbers = next(measured)
            forms = dict(Counter(layer.op for layer in contender.entry.model.layers))
            loss = each.quality.loss_against(first)
            rows.append(
                Row(each.strategy.text, passes, each.slug, numbers, loss, None, each.seconds, each.reused, forms)
            )
        return rows

    def _loaded(self, made: Made, there: int) -> Contender:
        """Raises `ResourceError` where it is not going to fit beside those that are loaded."""
        path, free = self.folder.artifact(made.slug), memory.available()
        needed = _ROOM * sum(each.stat().st_size for each in path.glob("*.safetensors"))
        if free is not None and needed > free:
            raise ResourceError(
                "the models do not fit into memory together, which takes turns to time them", where=path,
                why=f"{there} are loaded, {free / 1e9:.2f} GB are left, and this one may take {needed / 1e9:.2f}",
                hint="compare fewer strategies: what is made stays, and is not made again",
            )  # fmt: skip
        return artifact(made.strategy.text, path, backend=self.request.backend, device=self.request.options.device)


def _conditions(request: Request, sizes: Sequence[Size]) -> dict[str, Any]:
    """What the numbers depend on, as JSON."""
    able, options = torch.cpu.get_capabilities(), request.options
    machine = {
        "cpu": cpu_name(), "cores": able.get("num_physical_cores", os.cpu_count()),
        "flags": [flag for flag in FLAGS if able.get(flag)], "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    return {
        "machine": machine, "versions": versions(PACKAGES), "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2), "backend": request.backend, "device": str(options.device or "cpu"),
        "dtype": str(options.dtype), "seed": options.seed, "sizes": [list(size) for size in sizes], "new": request.new,
        "rounds": request.rounds, "calib": _name(options.calib), "train": _name(options.train),
    }  # fmt: skip


def _longest(captured: Captured) -> int | None:
    """The most tokens that the model takes."""
    return getattr(getattr(captured.config, "text_config", None) or captured.config, "max_position_embeddings", None)


def _name(data: Any) -> str | None:
    return None if data is None else str(data) if isinstance(data, (str, Path)) else f"a {type(data).__name__}"
