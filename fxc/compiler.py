"""optimize and load: the two functions that most programs call."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from fxc import ranks, streaming
from fxc.analysis.sizes import layers
from fxc.artifact import companions, config_json, store
from fxc.calibrate.journal import Saves, remove, saving
from fxc.captured import Captured, capture_source, capture_teacher, check_tokenizers, own_constants
from fxc.compilation import Calibration, Compilation, Configuration, Step
from fxc.compiled.model import CompiledModel, compiled_model
from fxc.data.calibration import calibration_samples, held_out
from fxc.data.labels import Samples
from fxc.errors import UsageError
from fxc.export.configuration import changed_fields, describe_config
from fxc.ir.digest import digest_of
from fxc.ir.program import Program
from fxc.lower.target import check_keep_float, check_target, warm_up
from fxc.neutral import one_at_a_time
from fxc.options import Keywords, Options
from fxc.parallel import Division, divide
from fxc.passes.base import Context, Pass, parse_passes
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.rewrites import Rewrites
from fxc.passes.teacher import Teacher
from fxc.pipeline import rehearse, run_passes
from fxc.progress import Say, Track, unsaid, untracked
from fxc.schemes.parameters import parameters


@one_at_a_time
def optimize(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    passes: str | Iterable[str | Pass] = "int8",
    *,
    on_step: Callable[[Step, Program], None] | None = None,
    **options: Unpack[Keywords],
) -> CompiledModel:
    """Compile a model: capture it, run `passes` over it, and return it ready to call.

    model: an `nn.Module`, which is not changed and may be changed afterwards, or a source: a Hugging Face folder, a hub id
    (with `revision`), an fxc artifact, or "package.module:function", which is run and returns a model or
    (model, example_inputs).
    example_inputs: a tuple of positional or a dict of keyword arguments; may be left out for Hugging Face models.
    passes, options: what `fxc.Options` takes, where each is explained. on_step: called after each pass.

    Raises `FxcError`: `UsageError`, `InputRefused`, `CaptureFailed`, `VerificationFailed` or `ResourceError`.
    """
    chosen = Options(passes, **options)
    chosen.check()
    teacher = capture_teacher(chosen, example_inputs)
    captured = capture_source(model, example_inputs, chosen, teacher)
    made = compile_captured(captured, chosen, on_step=on_step, teacher=teacher)
    if chosen.resume is not None and not made.program.is_streamed:
        remove(Path(chosen.resume))
    elif chosen.resume is not None:
        # The model's weights are in it.
        weakref.finalize(made.program.constants.spill, remove, Path(chosen.resume))
    return made


@one_at_a_time
def compile_captured(
    captured: Captured,
    options: Options,
    *,
    on_step: Callable[[Step, Program], None] | None = None,
    track: Track = untracked,
    say: Say = unsaid,
    teacher: Captured | None = None,
    read: Mapping[str, Samples] | None = None,
    rewrites: Rewrites | None = None,
) -> CompiledModel:
    """The second half of `optimize`, for a source that is captured already and keeps its program. track: shows how far it has
    come with calibration samples; say: tells what a pass is going to take. What passes saved in `options.resume`
    stays there. teacher: what `options.teacher` is. read: "calib" or "train" -> what `samples_of` gave for it, where that was
    read already; rewrites: takes the numbers of what passes change, and limits them in the place of `options.limit`."""
    before = captured.program
    context = Context(
        skip=options.skip, track=track, say=say, seed=options.seed, rewrites=rewrites or Rewrites(options.limit)
    )
    context.check_skip(before)
    if teacher is not None:
        context.teacher, context.is_other = taught_by(captured, teacher), not captured.is_compiled
    there = read or {}
    context.samples, context.held_out, calibration = _data(captured, options, "calib", track, there.get("calib"))
    context.training, context.judging, training = _data(captured, options, "train", track, there.get("train"))
    described = _Described(captured.config)

    def watch(step: Step, after: Program) -> None:
        described.follow(step, after)
        if on_step is not None:
            on_step(step, after)

    with _saves(options, captured.is_streamed) as context.saves:
        if captured.is_streamed:
            streaming.meet(options)
            before = replace(before, constants=streaming.constants_of(captured, options))
            learns = any(each.uses_data() for each in options.passes)
            if captured.small is not None and options.verify and not learns and ranks.number() == 0:
                say("trying the passes on the first layers")
                rehearse(captured.small, options)
        program, steps = run_passes(before, context, options, watch)
    if captured.borrowed:
        own_constants(program, before)
    config, changes = described.config, described.changes()
    record = Compilation(
        source=captured.source,
        dtype=str(options.dtype).removeprefix("torch."),
        skip=list(context.skip),
        skipped=context.skipped,
        bytes_before=captured.nbytes,
        bytes_after=program.nbytes(),
        parameters_before=parameters(before),
        parameters_after=parameters(program),
        coverage=_coverage(before, steps),
        earlier=captured.passes,
        passes=steps,
        calibration=calibration,
        training=training,
        teacher=teacher.source if teacher is not None else None,
        limit=options.limit,
        configuration=Configuration(changes, described.why_not) if changes or described.why_not else None,
        layers={each.name: each.as_json() for each in layers(before)},
    )
    files = captured.files | _plan(steps)
    if changes:
        files["config.json"] = config_json.encode(config, program.metadata["class"])
    return compiled_model(
        program,
        record,
        config=config,
        files=files,
        source=captured.folder,
        device=options.device,
        backend=options.backend,
        division=Division(ranks.number(), ranks.count()) if captured.is_streamed and ranks.number() else None,
    )


def _data(
    captured: Captured, options: Options, name: str, track: Track, read: Samples | None
) -> tuple[Samples, Samples, Calibration | None]:
    """Of `options.calib` or `options.train`: samples to learn from, samples to judge by, and what they are."""
    if getattr(options, name) is None:
        return Samples(), Samples(), None
    read = samples_of(captured, options, track, name) if read is None else read
    digest = digest_of_samples(read)
    learned, judged = held_out(read)
    most, length = getattr(options, f"{name}_samples"), getattr(options, f"{name}_length")
    return learned, judged, Calibration(len(learned), len(judged), most, length, digest)


def digest_of_samples(samples: Samples) -> str:
    """A hash of samples and their labels."""
    return digest_of(each for sample in [*samples, samples.labels or []] for each in sample)


def samples_of(captured: Captured, options: Options, track: Track = untracked, name: str = "calib") -> Samples:
    """What `options.calib`, or of another name `options.train`, is for the captured program: flat inputs, sample by sample."""
    with readers_of(captured) as folder:
        return calibration_samples(
            captured.program, getattr(options, name), folder=folder, config=captured.config,
            limit=getattr(options, f"{name}_samples"), window=getattr(options, f"{name}_length"), track=track,
            what={"calib": "calibration", "train": "training"}[name],
        )  # fmt: skip


def readers_of(captured: Captured) -> AbstractContextManager[Path | None]:
    """The folder of its tokenizer and its processor, while they are needed."""
    return nullcontext(captured.folder) if captured.has_own_tokenizer else companions.laid_out(captured.files)


def taught_by(captured: Captured, teacher: Captured) -> Program:
    """The program of the teacher. Raises UsageError for one that cannot teach this model."""
    check_tokenizers(captured, teacher)
    return Teacher(teacher.program, student=captured.program).program


@contextmanager
def _saves(options: Options, is_streamed: bool) -> Iterator[Saves | None]:
    """Where passes that learn save what they do, while they run."""
    has_data = options.calib is not None or options.train is not None
    if not (has_data or is_streamed) or (options.resume is None and options.calib_disk is None):
        yield None
    elif options.resume is not None:
        with saving(Path(options.resume), in_memory=options.calib_disk is None) as saves:
            yield saves
    else:
        folder = Path(options.calib_disk)
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="fxc-", dir=folder))
        try:
            with saving(own, in_memory=False) as saves:
                yield saves
        finally:
            shutil.rmtree(own, ignore_errors=True)


class _Described:
    """The Hugging Face configuration of what removal leaves, or why none says it, found before a pass that packs weights hides
    their shapes."""

    def __init__(self, original: Any):
        self.original = self.config = original
        self.why_not: str | None = None

    def follow(self, step: Step, after: Program) -> None:
        is_smaller = step.parameters_after < step.parameters_before
        is_packed = FLOAT_WEIGHTS.check(after) or DENSE_WEIGHTS.check(after)
        if is_smaller and not is_packed and self.original is not None:
            found, self.why_not = describe_config(after, self.original)
            self.config = self.original if found is None else found

    def changes(self) -> dict[str, tuple[Any, Any]]:
        return {} if self.config is self.original else changed_fields(self.original, self.config)


def _plan(steps: Sequence[Step]) -> dict[str, bytes]:
    """plan.json, which makes the decisions of a pass that chose by itself again."""
    again = next((s.repeat for s in steps if s.repeat), None)
    if again is None:
        return {}
    drops = parse_passes(again)[0].drop.split(";")
    return {"plan.json": (json.dumps({"drop": drops}, indent=0) + "\n").encode()}


def _coverage(before: Program, steps: Sequence[Step]) -> float:
    """Of the bytes that were there when the first pass came that rewrites weights, the share that was rewritten."""
    there = next((s.bytes_before for s in steps if s.covered_bytes), before.nbytes())
    return round(sum(s.covered_bytes for s in steps) / max(there, 1), 4)


@one_at_a_time
def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    backend: str | None = None,
    *,
    static_cache: bool | None = None,
    keep_compressed: bool = False,
    keep_float: float | None = None,
    tensor_parallel: bool = False,
) -> CompiledModel:
    """The compiled model in the artifact `directory`, verified. Executes nothing that the files say.

    static_cache: let a language model decode over buffers of a fixed size, on CUDA as a CUDA graph: True always, see
    `CompiledCausalLM.use_static_cache`; False never; None where it gives the same bits, see `CompiledCausalLM`.
    keep_compressed: run layers compressed also where their float form was measured to be faster: less memory, and the same
    choice on every load.
    keep_float: on a CPU, of the bytes that compression saves, the share from 0 to 1 that layers may take again where floats are
    faster: in floats, or with a float copy for some row counts beside the packed weights. 1 by default: never more than
    the original's bytes. Where not all of it fits, the layers that gain most have it; `layers` says which do without.
    tensor_parallel: in each of several processes (`torchrun`), a part of the heads and FFN channels. Every process loads and
    calls the model alike, and is given the same results; `division` says what is divided, and what is whole and why.

    Raises `InputRefused` for a damaged or hostile artifact, `UsageError` for a device or backend that does not exist,
    for a keep_float that is no share, and for tensor_parallel in a single process or where nothing can be divided.
    """
    path = Path(directory)
    if tensor_parallel:
        device = _meet(device, static_cache)
    check_target(device, backend)
    check_keep_float(device, keep_float)
    if not store.is_artifact(path):
        raise UsageError(
            "this is not an fxc artifact: it has no fxc.json",
            where=str(path),
            hint="'fxc compile MODEL -o DIR' writes one",
        )
    warm_up(device)
    read = store.read(path)
    program, division = read.program, None
    if tensor_parallel and ranks.count() > 1:
        program, division = divide(program, ranks.number(), ranks.count())
    model = compiled_model(
        program,
        read.manifest.get("report", {}),
        config=config_json.read(path),
        files=companions.of_folder(path),
        source=path,
        device=device,
        backend=backend,
        keep_compressed=keep_compressed,
        keep_float=keep_float,
        division=division,
    )
    if static_cache and not hasattr(model, "use_static_cache"):
        what = "only a causal language model has a cache of fixed size"
        raise UsageError(what, where="static_cache", hint="leave static_cache out")
    if static_cache is False and hasattr(model, "use_growing_cache"):
        return model.use_growing_cache()
    return model.use_static_cache() if static_cache else model


def _meet(device: str | torch.device | None, static_cache: bool | None) -> torch.device:
    """Meet the other processes. Returns the device of this one."""
    if static_cache:
        raise UsageError(
            "buffers of a fixed size were not tried in several processes", where="static_cache", hint="leave static_cache out"
        )
    check_target(device, None)
    ranks.join(device or "cpu")
    if not ranks.has_joined():
        raise UsageError(
            "this is a single process", where="tensor_parallel",
            hint="start the script by torchrun, which runs it in several, each of which calls fxc.load",
        )  # fmt: skip
    return ranks.own_device(device or "cpu")
