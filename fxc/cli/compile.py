"""fxc compile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxc import ranks
from fxc.analysis import sizes
from fxc.artifact.manifest import replaceable
from fxc.artifact.staging import check_target
from fxc.calibrate.journal import remove
from fxc.captured import Captured, capture_source, capture_teacher, is_streamed
from fxc.cli.bisect import bisect_line
from fxc.cli.sources import read_text
from fxc.cli.stages import Stages
from fxc.compilation import Step
from fxc.compiler import compile_captured, load, readers_of
from fxc.data.text import encode, tokenizer_of
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Pass
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.order import order
from fxc.passes.prune.prune import Prune, with_drops
from fxc.recipe import read_recipe
from fxc.report import compilation, outputs
from fxc.report.console import Output, size
from fxc.source.load import kind_of
from fxc.streaming import plan_of

_LONGEST_NAME = 120


@dataclass(frozen=True)
class CompileRequest:
    """What `fxc compile` was told. options: those of `Options` that were given, which come before what the recipe says; resume:
    whether passes go on from what a killed run saved; None: they save, and begin anew; False: nothing is saved; plan_only:
    whether only what it takes is said."""

    model: str
    options: dict[str, Any]
    out: Path | None
    recipe: Path | None
    eval_text: Path | None
    min_coverage: float
    overwrite: bool
    print_after: tuple[str, ...]
    measure: bool
    drop: tuple[str, ...]
    plan: Path | None
    report: bool
    resume: bool | None
    plan_only: bool = False


def compile_model(request: CompileRequest, output: Output) -> None:
    """Compile and write. Under torchrun every process compiles, training shares its batches, and the first one alone saves,
    writes and prints."""
    if not ranks.is_first():
        output.silence()
        request = replace(request, resume=False)
    said = read_recipe(request.recipe) if request.recipe else {}
    options = Options(**(said | request.options))
    wanted = with_drops(options.passes, request.drop, str(request.plan) if request.plan else "")
    options = replace(options, passes=wanted)
    ordered = order(wanted).passes
    _check_print_after(request.print_after, ordered)
    text = read_text(request.eval_text, "--eval-text") if request.eval_text else None
    options.check()
    learns = any(each.uses_data() for each in ordered)
    if options.calib and not learns:
        left = "only the gates read it" if options.verify else "it changes nothing"
        output.warn(f"--calib {options.calib}: no pass of this recipe uses calibration data, so {left}")
        options = options if options.verify else replace(options, calib=None)
    local = kind_of(request.model) in ("folder", "artifact")
    source = Path(request.model).expanduser() if local else None
    out = request.out or default_out(request.model, wanted)
    least = _least_bytes(source, ordered) if source is not None else 0
    check_target(out, source, replaceable if request.overwrite else None, least)

    has_saves = is_streamed(request.model, options) or (learns and not (options.calib is None and options.train is None))
    options = _with_saves(request.resume, options, out, has_saves)

    teacher = None
    if options.teacher is not None:
        with output.doing(f"capturing the teacher {options.teacher}"):
            teacher = capture_teacher(options)
    with output.doing(f"capturing {request.model}"):
        captured = capture_source(request.model, options=options, teacher=teacher)
    if unused := captured.source.get("unused"):
        output.warn(f"the checkpoint holds {size(unused['bytes'])} that the model does not use: {unused['tensors']}")
    if captured.is_streamed or request.plan_only:
        plan = plan_of(captured, options)
        if request.plan_only:
            output.line(plan)
            output.json(asdict(plan))
            return
        output.note(plan)
        plan.check()
        check_target(out, source, replaceable if request.overwrite else None, plan.result or 0)
    if captured.is_streamed and (request.measure or text is not None):
        output.note("neither quality nor time is measured after the passes, for the model is read piece by piece")
        request, text = replace(request, measure=False), None
    scored = _scored(captured, text) if text is not None else None
    stages = Stages(captured)
    with output.doing(f"compiling with {', '.join(map(str, ordered)) or 'no passes'}", elsewhere=False):
        on_step = _on_step(output, request.print_after, stages, {str(p): p.is_policy for p in ordered})
        try:
            model = compile_captured(captured, options, on_step=on_step, track=output.track, say=output.note, teacher=teacher)
        except VerificationFailed as error:
            hint = f"{error.hint}; which rewrite it is: {bisect_line(request.model, options)}"
            told = {"where": error.where, "why": error.why, "hint": hint, "excerpt": error.excerpt}
            raise VerificationFailed(error.what, **told) from error
        except BaseException:
            if options.resume and Path(options.resume).is_dir():
                output.note("what passes have learned is saved: the same command with --resume goes on from there")
            raise
    if not ranks.is_first():
        return
    record = model.record
    if record.coverage < request.min_coverage:
        raise VerificationFailed(
            f"only {record.coverage:.1%} of the weight bytes were rewritten, and --min-coverage is {request.min_coverage:.1%}",
            where=request.model,
            why=compilation.why_so_little(record),
            hint="nothing was written; 'fxc inspect' shows where the bytes are",
        )
    if request.measure or scored is not None:
        record.stages, record.perplexity = stages.measure(scored, options.device, output, request.measure)
    with output.doing(f"writing {out}", elsewhere=False):
        model.save(out, overwrite=request.overwrite, source=source)
    if options.resume:
        remove(options.resume)
    if options.backend is not None:
        with output.doing(f"preparing it for the backend {options.backend}", elsewhere=False):
            load(out, device=options.device, backend=options.backend).prepare()

    before, after = captured.program, model.program
    was = sizes.on_disk(source) if source and kind_of(request.model) == "artifact" else captured.nbytes
    packed = FLOAT_WEIGHTS.broken(after) | DENSE_WEIGHTS.broken(after)
    disk = was, sizes.on_disk(out)
    compilation.show(output, record, disk, (before.nbytes(), after.nbytes()), packed)
    if teacher is not None:
        share = after.numel() / max(teacher.program.numel(), 1)
        count = f"{after.numel():,} of its {teacher.program.numel():,} parameters ({share:.1%})"
        output.line(f"taught by {options.teacher}: {count}")
    if request.report:
        compilation.show_all(output, record, (sizes.bytes_by_kind(before), sizes.bytes_by_kind(after)))
    if any(p.is_policy and p.shrinks for p in ordered) and record.coverage < compilation.LOW_COVERAGE:
        output.warn(f"less than half of the weight bytes were rewritten: {compilation.why_so_little(record)}")
    if scored is None:
        output.line(_how_to_measure(options.teacher or request.model, out, causal=is_causal_lm(before)))
    if "plan.json" in model.files:
        # What else the pass was told is in the plan.
        passes = shlex.quote(",".join("prune" if isinstance(p, Prune) else str(p) for p in wanted))
        plan = shlex.quote(str(out / "plan.json"))
        plugins = dict.fromkeys(f" --plugin {step.plugin['module']}" for step in record.passes if step.plugin)
        again = f"{shlex.quote(request.model)} --passes {passes} --plan {plan}{''.join(plugins)}"
        output.line(f"the same again: fxc compile {again} -o OTHER")
    output.line(outputs.how_to_run(model, out))
    output.json(compilation.as_json(record, str(out), disk))


def _with_saves(resume: bool | None, options: Options, out: Path, saves: bool) -> Options:
    """Where passes save what they do: beside the output, or on the disk for hidden states."""
    if options.limit is not None and resume:
        raise UsageError("a run that is cut off is not resumed", where="--resume", hint="leave it out, or --limit")
    if resume is False or options.limit is not None:
        return options
    if not saves:
        if resume:
            raise UsageError("no pass learns from data, and others begin anew", where="--resume", hint="leave it out")
        return options
    folder = Path(options.calib_disk or out.parent) / f".{out.name}.fxc-resume"
    if not resume:
        remove(folder)
    return replace(options, resume=folder)


def default_out(model: str, passes: Sequence[Pass]) -> Path:
    """The folder to write when none was given, in the current one: the name of the model and what was done to it, as in
    pylm-int8-prune; of a hub id the part after the slash, of a function its name."""
    local = kind_of(model) in ("folder", "artifact")
    name = Path(model).expanduser().resolve().name if local else re.split(r"[/:]", model)[-1]
    # Which units go by decree is too long for a name.
    done = [re.sub(r":(drop|plan)=[^:]*", r":\1", str(each)) for each in passes] or ["captured"]
    return Path("-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in (name or "model", *done))[:_LONGEST_NAME])


def _how_to_measure(model: str, out: Path, *, causal: bool) -> str:
    against = f"fxc eval {shlex.quote(str(out))} --against {shlex.quote(model)}"
    if causal:
        return f"quality was not measured: --eval-text FILE gives the perplexity after every pass; or: {against} --text FILE"
    return f"quality was not measured beyond the gates: {against} compares the two"


def _least_bytes(source: Path, passes: list[Pass]) -> int:
    """No result is smaller: a policy leaves at least a sixteenth of the weights, as int4 of half of a float32 model."""
    weights = sum(p.stat().st_size for p in source.glob("*.safetensors") if p.is_file())
    return weights // 16 if any(p.is_policy for p in passes) else weights // 2


def _check_print_after(names: tuple[str, ...], ordered: list[Pass]) -> None:
    known = [p.name for p in ordered]
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"no pass {missing[0]!r} is going to run", where="--print-after", hint=f"one of {', '.join(known)}")


def _on_step(
    output: Output, print_after: tuple[str, ...], stages: Stages, is_policy: dict[str, bool]
) -> Callable[[Step, Program], None]:
    def on_step(step: Step, program: Program) -> None:
        output.note(f"{step.name}: {step.changed} changed in {step.seconds:.2f} s")
        stages.add(step, program, is_policy[step.name])
        if step.name.partition(":")[0] in print_after:
            output.note_block(str(program))

    return on_step


def _scored(captured: Captured, text: str) -> torch.Tensor:
    """The tokens of the evaluation text, by the source's tokenizer."""
    if not is_causal_lm(captured.program):
        raise UsageError("only causal language models have a perplexity", where="--eval-text", hint="leave it out")
    with readers_of(captured) as folder:
        return encode(tokenizer_of(folder), text)
