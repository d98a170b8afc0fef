"""fxc search: which compression for which layers, under budgets, predicted and then measured.

Each layer's error in each format comes from one calibration pass (`errors`), how much it matters from a few runs with noise
(`influence`), and the sum over layers is the predicted loss. An integer program chooses (`knapsack`), and what it chooses is
compiled and measured (`trials`) beside every uniform choice that fits and might be better; then formats of a group or two are
exchanged for as long as that is measured to be better (`steps`). What was measured decides, and what was predicted stands
beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from fxc.captured import Captured, capture_source, part_of
from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError
from fxc.measure.bench import Entry
from fxc.measure.contenders import Contender, Size, artifact, compiled, original_contender, sizes_for, sizes_of
from fxc.measure.quality import evaluation_of
from fxc.neutral import one_at_a_time
from fxc.options import Keywords, Options
from fxc.progress import Say, Track, unsaid, untracked
from fxc.selection.budget import Budget, parse_budget
from fxc.selection.formats import parse_formats
from fxc.selection.found import Found
from fxc.selection.prediction import predictions_of
from fxc.selection.steps import Steps
from fxc.selection.trials import Trials
from fxc.source.load import kind_of

TRIALS, MINUTES = 24, 10.0


@one_at_a_time
def search(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    budget: str | Budget,
    eval: Any = None,
    eval_samples: int | None = None,
    formats: str | Iterable[str] | None = None,
    sizes: str | Sequence[Size] = (),
    trials: int = TRIALS,
    minutes: float = MINUTES,
    track: Track = untracked,
    say: Say = unsaid,
    **options: Unpack[Keywords],
) -> Found:
    """The best compression of `model` within `budget`, as "size=0.4x,latency=0.6x,quality=1%" (see `Budget`): of quality, size
    and latency the first that has no budget is made as good as it can be, and quality where all have one.

    model, example_inputs, options: as of `fxc.optimize`; `calib` is what formats learn from, and `seed` is of the noise too.
    eval: data that quality is measured on, as `calib`, with labels where it has some; None: made up. eval_samples: at most so
    many of it. formats: what layers may become, as "int8;int4:group=32:algorithm=gptq" (default:
    `fxc.selection.formats.DEFAULTS`). sizes: "1x128,8x512", where latency has a budget. trials: how many compilations are
    measured at most. minutes: no trial begins that would end later, counted from here, if it took as long as the longest so
    far; predictions and the first trial are made in any case. What was not tried for that is in `Found.untried`.

    Raises what `fxc.optimize` raises, and `VerificationFailed` where nothing meets the budget, with what is nearest.
    """
    chosen = checked(Options("", **options))
    wanted = parse_budget(budget) if isinstance(budget, str) else budget
    parse_formats(formats)
    at = sizes_of(sizes) if isinstance(sizes, str) and sizes else list(sizes)
    if at and not wanted.is_timed:
        raise UsageError("latency has no budget, and is not measured", where="sizes", hint="latency=0.6x, or no sizes")
    if trials < 1:
        raise UsageError(f"{trials} trials find nothing", where="trials", hint="8 or more")
    if not minutes > 0:
        raise UsageError(f"{minutes:g} minutes are no time", where="minutes", hint="10 or more")
    until = time.monotonic() + 60 * minutes
    say("capturing the model ...")
    captured = capture_source(model, example_inputs, chosen)
    evaluation = evaluation_of(captured, eval, samples=eval_samples, seed=chosen.seed, track=track)
    at = sizes_for(captured.program, at)
    original = _original(model, captured, chosen) if wanted.is_timed else None
    predictions = predictions_of(captured, chosen, parse_formats(formats, captured.program), track)
    measured = Trials(
        captured, chosen, predictions.samples, evaluation, trials, until=until, original=original, sizes=at, say=say
    )
    if original is not None:
        predictions = predictions.with_times(captured, chosen, at, measured.seconds, track)
    return Steps(captured, chosen, wanted, predictions, measured).run()


def _original(model: nn.Module | str | Path, captured: Captured, options: Options) -> Contender:
    """What latencies are shares of: the model as it comes."""
    if isinstance(model, CompiledModel):
        return compiled("original", model, captured.nbytes)
    if isinstance(model, nn.Module):
        module, _ = part_of(model, options.part)
        return Contender(Entry("original", "torch eager", module, captured.program, captured.nbytes), captured.nbytes)
    if kind_of(str(model)) == "artifact":
        return artifact("original", model, backend=options.backend or "eager", device=options.device)
    return original_contender(
        str(model), captured, dtype=str(options.dtype).removeprefix("torch."), device=options.device,
        revision=options.revision, trust_remote_code=options.trust_remote_code, part=options.part,
    )  # fmt: skip


def checked(options: Options) -> Options:
    """Raises `UsageError` for options that no search has."""
    if options.calib is None:
        raise UsageError("formats learn from data", where="calib", hint="--calib FILE, in Python calib=...")
    options.check()
    if not isinstance(options.calib, (str, Path, Tensor, Mapping)):
        return replace(options, calib=list(options.calib))
    return options
