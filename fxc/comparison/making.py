"""From strategies to artifacts with their quality, or to reasons why there is none; what an earlier run has made stays."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxc.artifact.manifest import replaceable
from fxc.artifact.staging import check_target
from fxc.calibrate.journal import remove
from fxc.captured import Captured
from fxc.comparison.folder import Folder
from fxc.comparison.request import Request
from fxc.comparison.result import reason
from fxc.comparison.strategies import Strategy, slug_of
from fxc.compiled.model import CompiledModel
from fxc.compiler import compile_captured, digest_of_samples, load, samples_of
from fxc.data.labels import Samples
from fxc.errors import FxcError, ResourceError, UsageError
from fxc.kernel_bench.files import versions
from fxc.measure.quality import Evaluation, Quality
from fxc.options import Options
from fxc.progress import Pace, Say, Track

PACKAGES = ("fxc", "torch", "transformers")
# Timing comes after all strategies, and takes about as long as two simple ones.
TIMING = 2.0


@dataclass(frozen=True)
class Made:
    """What became of one strategy. slug: the name of its artifact's folder; hash: what the artifact says that it is; why_not:
    the error for which there are no numbers, as JSON (`FxcError.as_json`); seconds: what making it took; reused: whether an
    earlier run had made it."""

    strategy: Strategy
    slug: str
    hash: str | None = None
    why_not: dict[str, Any] | None = None
    quality: Quality | None = None
    seconds: float | None = None
    reused: bool = False

    @property
    def is_done(self) -> bool:
        return self.quality is not None or self.why_not is not None


class Maker:
    """Makes the strategies of a comparison in its folder. program: the hash of the captured program."""

    def __init__(
        self, request: Request, captured: Captured, program: str, evaluation: Evaluation, folder: Folder, track: Track, say: Say
    ) -> None:
        self.request, self.captured, self.program, self.evaluation = request, captured, program, evaluation
        self.folder, self.track, self.say = folder, track, say
        self.data = _Data(captured, track)
        files = ((name, f if isinstance(f, bytes) else Path(f).read_bytes()) for name, f in captured.files.items())
        self.files = {name: hashlib.sha256(content).hexdigest() for name, content in files}

    def all(self) -> tuple[list[Made], str | None]:
        """Every strategy, and how long timing them is going to take, in words."""
        plan = [(each, slug_of(each), self._key(each)) for each in self.request.strategies]
        before = [self._before(*each) for each in plan]
        pace = Pace([0.0 if was and was.is_done else each[0].effort for was, each in zip(before, plan, strict=True)] + [TIMING])
        done = []
        for number, (was, (strategy, slug, key)) in enumerate(zip(before, plan, strict=True)):
            about = f"{number + 1} of {len(plan)}: {strategy.text}"
            if was and was.is_done:
                self.say(f"{about}: done before")
            else:
                left = pace.left(number)
                self.say(f"{about}{f', {left}' if left else ''} ...")
                was = self._make(strategy, slug, key) if was is None else self._measured(was, key)
            if was.why_not:
                self.say(f"{strategy.text}: left out: {reason(was.why_not)}")
            done.append(was)
        return done, pace.left(len(plan))

    def _options(self, strategy: Strategy) -> Options:
        """How to compile it: data goes only to what reads it."""
        base = self.request.options
        skip = (base.skip,) if isinstance(base.skip, str) else tuple(base.skip)
        return replace(
            base, passes=strategy.passes, skip=(*skip, *strategy.skip), **strategy.amounts,
            calib=base.calib if strategy.learns else None, train=base.train if strategy.trains else None,
        )  # fmt: skip

    def _key(self, strategy: Strategy) -> dict[str, Any]:
        """All that its artifact depends on, as JSON."""
        options = self._options(strategy)
        return {
            "program": self.program, "files": self.files, "passes": [str(each) for each in strategy.passes],
            "skip": list(options.skip), "dtype": [str(options.dtype), strategy.dtype], "seed": options.seed,
            "checks": [options.verify, options.allow_noop, options.budget, options.layer_budget],
            "data": self.data.digests(options), "versions": versions(PACKAGES), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _before(self, strategy: Strategy, slug: str, key: dict[str, Any]) -> Made | None:
        """What an earlier run made of it, without quality where that was measured on other data."""
        entry = self.folder.read(slug) or {}
        if entry.get("key") != key:
            return None
        if isinstance(why_not := entry.get("why_not"), dict):
            return Made(strategy, slug, why_not=why_not, reused=True)
        if entry.get("hash") is None or entry["hash"] != self.folder.hash_of(slug):
            return None
        quality = Quality.from_whole(entry.get("quality")) if entry.get("measured_by") == self._measures() else None
        return Made(strategy, slug, entry["hash"], quality=quality, seconds=entry.get("seconds"), reused=True)

    def _measures(self) -> list[str]:
        """What the quality of an artifact depends on besides it."""
        return [self.evaluation.digest, self.request.backend, str(self.request.options.device or "cpu")]

    def _make(self, strategy: Strategy, slug: str, key: dict[str, Any]) -> Made:
        """Compile it, write its artifact and measure its quality; or why not. Raises what is wrong with the folder."""
        began = time.perf_counter()
        path = self.folder.artifact(slug)
        check_target(path, self.request.folder, replaceable)
        # From now on what is there under this name is this strategy's.
        self.folder.write(slug, {"key": key})
        try:
            model = self._compiled(strategy, slug)
        except ResourceError as error:
            # Later there may be what is missing.
            return Made(strategy, slug, why_not=error.as_json())
        except FxcError as error:
            self.folder.write(slug, {"key": key, "why_not": error.as_json()})
            return Made(strategy, slug, why_not=error.as_json())
        model.save(path, overwrite=True, source=self.request.folder)
        remove(self.folder.resume(slug))
        made = Made(strategy, slug, self.folder.hash_of(slug), seconds=round(time.perf_counter() - began, 3))
        self.folder.write(slug, {"key": key, "hash": made.hash, "seconds": made.seconds})
        return self._measured(made, key, model)

    def _compiled(self, strategy: Strategy, slug: str) -> CompiledModel:
        options = self._options(strategy)
        if strategy.dtype not in (None, "auto", options.dtype):
            raise UsageError(
                f"the recipe is for {strategy.dtype}, and the model was captured in dtype {options.dtype}", where=strategy.text,
                hint=f"compare it with --dtype {strategy.dtype}",
            )  # fmt: skip
        strategy.check_data(options.calib is not None, options.train is not None)
        read = self.data.read(options)
        # Without data nothing is learned, and nothing saved.
        options = replace(options, resume=self.folder.resume(slug) if read else None)
        return compile_captured(self.captured, options, track=self.track, say=self.say, read=read)

    def _measured(self, made: Made, key: dict[str, Any], model: CompiledModel | None = None) -> Made:
        """With the quality of its artifact."""
        if model is None:
            path = self.folder.artifact(made.slug)
            model = load(path, device=self.request.options.device, backend=self.request.backend)
        try:
            quality = self.evaluation.measure(model, self.track)
        except FxcError as error:
            found = error.as_json()
            return replace(made, why_not=found | {"what": f"its quality could not be measured: {error.what}"})
        entry = {"key": key, "hash": made.hash, "seconds": made.seconds, "measured_by": self._measures()}
        self.folder.write(made.slug, entry | {"quality": quality.whole()})
        return replace(made, quality=quality)


class _Data:
    """What passes learn from, read once for each amount that a strategy asks for."""

    def __init__(self, captured: Captured, track: Track) -> None:
        self.captured, self.track = captured, track
        self._read: dict[tuple[str, int, int], tuple[Samples, str]] = {}

    def _of(self, options: Options) -> dict[str, tuple[str, int, int]]:
        """"calib", "train", where they are given -> which of it."""
        return {
            name: (name, getattr(options, f"{name}_samples"), getattr(options, f"{name}_length"))
            for name in ("calib", "train") if getattr(options, name) is not None
        }  # fmt: skip

    def _whole(self, amount: tuple[str, int, int], options: Options) -> tuple[Samples, str]:
        if amount not in self._read:
            samples = samples_of(self.captured, options, self.track, amount[0])
            self._read[amount] = samples, digest_of_samples(samples)
        return self._read[amount]

    def read(self, options: Options) -> dict[str, Samples]:
        return {name: self._whole(amount, options)[0] for name, amount in self._of(options).items()}

    def digests(self, options: Options) -> dict[str, list[Any]]:
        return {name: [self._whole(amount, options)[1], *amount[1:]] for name, amount in self._of(options).items()}
