"""fxc compile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fxc.artifact.manifest import replaceable
from fxc.artifact.staging import check_target, check_writable
from fxc.captured import Captured, capture_source
from fxc.cli.sources import read_text
from fxc.cli.stages import Stages
from fxc.compilation import Step
from fxc.compiler import compile_captured
from fxc.data.calibration import check_data
from fxc.data.text import encode, tokenizer_of
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.passes.base import Pass, check_data_is_given, parse_passes
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.order import order
from fxc.passes.prune.prune import Prune, with_drops
from fxc.recipe import Recipe, read_recipe
from fxc.report import compilation, outputs, sizes
from fxc.report.console import Output, size
from fxc.source.load import as_dtype, kind_of

_LONGEST_NAME = 120


@dataclass(frozen=True)
class CompileRequest:
    """The options of `fxc compile`, as given."""

    model: str
    out: Path | None
    passes: str | None
    recipe: Path | None
    skip: tuple[str, ...]
    calib: Path | None
    eval_text: Path | None
    dtype: str | None
    device: str | None
    revision: str | None
    trust_remote_code: bool
    budget: float | None
    layer_budget: float | None
    min_coverage: float
    allow_noop: bool
    overwrite: bool
    dump_dir: Path | None
    print_after: tuple[str, ...]
    verify: bool
    measure: bool
    drop: tuple[str, ...]
    plan: Path | None
    dynamic: tuple[str, ...]
    part: str | None
    report: bool


def compile_model(request: CompileRequest, output: Output) -> None:
    recipe = read_recipe(request.recipe) if request.recipe else Recipe()
    given = (request.passes, recipe.passes, "int8")
    wanted = parse_passes(next(passes for passes in given if passes is not None))
    wanted = with_drops(wanted, request.drop, str(request.plan) if request.plan else "")
    skip = request.skip or recipe.skip or ()
    dtype = next(dtype for dtype in (request.dtype, recipe.dtype, "auto") if dtype is not None)
    as_dtype(dtype)
    ordered = order(wanted).passes
    _check_print_after(request.print_after, ordered)
    text = read_text(request.eval_text, "--eval-text") if request.eval_text else None
    if request.calib:
        check_data(request.calib)
    check_data_is_given(ordered, request.calib is not None)
    learns = any(each.uses_data() for each in ordered)
    if request.calib and not learns:
        output.warn(f"--calib {request.calib}: no pass of this recipe uses calibration data, so it changes nothing")
    local = kind_of(request.model) in ("folder", "artifact")
    source = Path(request.model).expanduser() if local else None
    out = request.out or default_out(request.model, wanted)
    least = _least_bytes(source, ordered) if source is not None else 0
    check_target(out, source, replaceable if request.overwrite else None, least)
    if request.dump_dir is not None:
        check_writable(request.dump_dir / "program")

    with output.doing(f"capturing {request.model}"):
        captured = capture_source(
            request.model,
            dynamic_shapes=_dynamic_shapes(request.dynamic),
            dtype=dtype,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
            part=request.part,
            check=request.verify,
        )
    if unused := captured.source.get("unused"):
        output.warn(f"the checkpoint holds {size(unused['bytes'])} that the model does not use: {unused['tensors']}")
    scored = _scored(captured, text) if text is not None else None
    stages = Stages(captured)
    with output.doing(f"compiling with {', '.join(map(str, ordered)) or 'no passes'}", elsewhere=False):
        model = compile_captured(
            captured,
            wanted,
            skip=skip,
            calib=request.calib if learns else None,
            dtype=dtype,
            device=request.device,
            verify=request.verify,
            budget=request.budget,
            layer_budget=request.layer_budget,
            allow_noop=request.allow_noop,
            dump_dir=request.dump_dir,
            on_step=_on_step(output, request.print_after, stages, {str(p): p.is_policy for p in ordered}),
            track=output.track,
        )
    record = model.record
    if record.coverage < request.min_coverage:
        raise VerificationFailed(
            f"only {record.coverage:.1%} of the weight bytes were rewritten, and --min-coverage is {request.min_coverage:.1%}",
            where=request.model,
            why=compilation.why_so_little(record),
            hint="nothing was written; 'fxc inspect' shows where the bytes are",
        )
    if request.measure or scored is not None:
        record.stages, record.perplexity = stages.measure(scored, request.device, output, request.measure)
    with output.doing(f"writing {out}", elsewhere=False):
        model.save(out, overwrite=request.overwrite, source=source)

    before, after = captured.program, model.program
    was = sizes.on_disk(source) if source and kind_of(request.model) == "artifact" else captured.nbytes
    packed = FLOAT_WEIGHTS.broken(after) | DENSE_WEIGHTS.broken(after)
    compilation.show(output, record, (was, sizes.on_disk(out)), (before.nbytes(), after.nbytes()), packed)
    if request.report:
        compilation.show_all(output, record, (sizes.bytes_by_kind(before), sizes.bytes_by_kind(after)))
    if any(p.is_policy and p.shrinks for p in ordered) and record.coverage < compilation.LOW_COVERAGE:
        output.warn(f"less than half of the weight bytes were rewritten: {compilation.why_so_little(record)}")
    if scored is None:
        output.line(_how_to_measure(request.model, out, causal=is_causal_lm(before)))
    if "plan.json" in model.files:
        # What else the pass was told is in the plan.
        passes = shlex.quote(",".join("prune" if isinstance(p, Prune) else str(p) for p in wanted))
        plan = shlex.quote(str(out / "plan.json"))
        output.line(f"the same again: fxc compile {shlex.quote(request.model)} --passes {passes} --plan {plan} -o OTHER")
    output.line(f"written to {out}")
    output.line(outputs.how_to_run(model, out))
    output.json(compilation.as_json(record, str(out)))


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


def _dynamic_shapes(given: tuple[str, ...]) -> dict[str, tuple[int, ...]] | None:
    """`x:0,1` -> {"x": (0, 1)}."""
    shapes = {}
    for each in given:
        name, _, dimensions = each.rpartition(":")
        if not name or not all(part.isdecimal() for part in dimensions.split(",")):
            raise UsageError(
                "this does not name the dimensions of an input", where=f"--dynamic {each}", hint="NAME:0,1, counted from 0"
            )
        shapes[name] = tuple(map(int, dimensions.split(",")))
    return shapes or None


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
    return encode(tokenizer_of(captured.folder), text)
