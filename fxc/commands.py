"""What each command of the command line does: the steps, and which table shows which result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxc
from fxc import bench
from fxc import evaluate as quality
from fxc.compiler import Captured, capture_source, compile_captured
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.program import Program
from fxc.load import kind_of, load_source
from fxc.passes.base import Pass, parse_passes
from fxc.passes.order import order
from fxc.pipeline import Step
from fxc.recipe import Recipe, read_recipe
from fxc.report import compilation, machine, outputs, sizes
from fxc.report.console import Output, size
from fxc.report.difference import difference
from fxc.runtime.manifest import replaceable
from fxc.runtime.model import CompiledModel, compiled_model
from fxc.runtime.staging import check_target

_LARGEST_LAYERS = 15
_LAYER_INPUTS = 4


# -------------------------------------------------------------------------------------------------------------- compile


@dataclass(frozen=True)
class CompileRequest:
    """The options of `fxc compile`, as given."""

    model: str
    out: Path
    passes: str | None
    recipe: Path | None
    skip: tuple[str, ...]
    calib: Path | None
    eval_text: Path | None
    dtype: str | None
    device: str | None
    revision: str | None
    trust_remote_code: bool
    budget: float
    min_coverage: float
    allow_noop: bool
    overwrite: bool
    dump_dir: Path | None
    print_after: tuple[str, ...]
    verify: bool


def compile_model(request: CompileRequest, output: Output) -> None:
    recipe = read_recipe(request.recipe) if request.recipe else Recipe()
    wanted = parse_passes(request.passes if request.passes is not None else recipe.passes or "int8")
    skip = request.skip or recipe.skip or ()
    dtype = request.dtype or recipe.dtype or "auto"
    ordered = order(wanted).passes
    _check_print_after(request.print_after, ordered)
    text = _read(request.eval_text, "--eval-text") if request.eval_text else None
    if request.calib:
        _read(request.calib, "--calib")
        output.warn(f"--calib {request.calib}: no pass of this recipe uses calibration data, so it changes nothing")
    local = kind_of(request.model) in ("folder", "artifact")
    source = Path(request.model).expanduser() if local else None
    check_target(request.out, source, replaceable if request.overwrite else None)

    with output.doing(f"capturing {request.model}"):
        captured = capture_source(
            request.model,
            dtype=dtype,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
            check=request.verify,
        )
    scored = _scored(captured, text) if text is not None else None
    with output.doing(f"compiling with {', '.join(map(str, ordered)) or 'no passes'}"):
        model = compile_captured(
            captured,
            wanted,
            skip=skip,
            dtype=dtype,
            device=request.device,
            verify=request.verify,
            budget=request.budget,
            allow_noop=request.allow_noop,
            dump_dir=request.dump_dir,
            on_step=_on_step(output, request.print_after),
        )
    report = model.report
    if report["coverage"] < request.min_coverage:
        raise VerificationFailed(
            f"only {report['coverage']:.1%} of the weight bytes were rewritten, and --min-coverage is {request.min_coverage:.1%}",
            where=request.model,
            why=compilation.why_so_little(report),
            hint="nothing was written; 'fxc inspect' shows where the bytes are",
        )
    if scored is not None:
        report["perplexity"] = _perplexities(captured, model, scored, request.device, output)
    with output.doing(f"writing {request.out}"):
        model.save(request.out, overwrite=request.overwrite, source=source)

    before, after = captured.program, model.program
    disk = (
        (sizes.on_disk(source) if source and kind_of(request.model) == "artifact" else captured.nbytes),
        sizes.on_disk(request.out),
    )
    kinds = sizes.bytes_by_kind(before), sizes.bytes_by_kind(after)
    compilation.show(output, report, kinds, disk, (before.nbytes(), after.nbytes()))
    if any(p.is_policy for p in ordered) and report["coverage"] < compilation.LOW_COVERAGE:
        output.warn(f"less than half of the weight bytes were rewritten: {compilation.why_so_little(report)}")
    output.line(f"written to {request.out}")
    output.json(compilation.as_json(report, str(request.out)))


def _check_print_after(names: tuple[str, ...], ordered: list[Pass]) -> None:
    known = [p.name for p in ordered]
    if missing := [name for name in names if name not in known]:
        raise UsageError(
            f"no pass {missing[0]!r} is going to run", where="--print-after", hint=f"one of {', '.join(known)}"
        )


def _on_step(output: Output, print_after: tuple[str, ...]) -> Callable[[Step, Program], None]:
    def on_step(step: Step, program: Program) -> None:
        output.note(f"{step.name}: {step.changed} changed in {step.seconds:.2f} s")
        if step.name.partition(":")[0] in print_after:
            output.note_block(str(program))

    return on_step


def _scored(captured: Captured, text: str) -> torch.Tensor:
    """The tokens of the evaluation text, by the source's tokenizer."""
    if captured.program.metadata.get("kind") != "causal_lm":
        raise UsageError("only causal language models have a perplexity", where="--eval-text", hint="leave it out")
    return quality.encode(quality.tokenizer_of(_folder_of(captured)), text)


def _folder_of(captured: Captured) -> Path | None:
    paths = [p for p in captured.files.values() if isinstance(p, Path)]
    return paths[0].parent if paths else None


def _perplexities(
    captured: Captured, model: CompiledModel, tokens: torch.Tensor, device: str | None, output: Output
) -> dict[str, Any]:
    original = compiled_model(captured.program, {}, config=captured.config, files=captured.files, device=device)
    before, after = (
        quality.perplexity(m, tokens, track=lambda items, w=what: output.track(items, f"perplexity {w}"))
        for m, what in ((original, "before"), (model, "after"))
    )
    relative, error = quality.change(before, after)
    return {
        "before": before.value, "after": after.value, "change": relative, "standard_error": error,
        "tokens": before.tokens, "window": before.window,
    }  # fmt: skip


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=f"{option} {path}", why=error) from error


# ------------------------------------------------------------------------------------------------------------------ run


def run_model(
    output: Output,
    out: Path,
    prompt: str | None,
    new: int,
    text: str | None,
    image: Path | None,
    backend: str,
    device: str | None,
) -> None:
    with output.doing(f"loading {out}"):
        model = fxc.load(out, device=device, backend=backend)
    if prompt is not None:
        made = outputs.generate(model, out, prompt, new)
        output.block(made["prompt"] + made["text"])
        output.note(f"{made['tokens']} tokens in {made['seconds']:.2f} s on {model.device}, backend {backend}")
    else:
        made = outputs.read(model, out, text, image)
        if made["kind"] == "labels":
            rows = [(row["label"], f"{row['probability']:.4f}") for row in made["top"]]
            output.table("labels", ["label", ">probability"], rows)
        else:
            first = ", ".join(f"{value:.4f}" for value in made["first"])
            output.line(f"{made['of']}: {made['size']} numbers, norm {made['norm']:.4f}, the first: {first}")
    output.json(made)


# ----------------------------------------------------------------------------------------------------------------- eval


@dataclass(frozen=True)
class EvalRequest:
    """The options of `fxc eval`, as given."""

    model: str
    text: Path | None
    against: str | None
    window: int
    windows: int | None
    backend: str
    device: str | None
    dtype: str
    revision: str | None
    trust_remote_code: bool


def evaluate(request: EvalRequest, output: Output) -> None:
    if request.text is None and request.against is None:
        raise UsageError(
            "there is nothing to measure", hint="--text FILE for perplexity, --against ORIGINAL for agreement"
        )
    text = _read(request.text, "--text") if request.text else None
    result: dict[str, Any] = {"model": request.model}
    if request.against is None:
        result |= _perplexity_of(request, text, output)
    else:
        result |= _agreement_of(request, text, output)
    output.json(result)


def _perplexity_of(request: EvalRequest, text: str, output: Output) -> dict[str, Any]:
    with output.doing(f"loading {request.model}"):
        if kind_of(request.model) == "artifact":
            model: Any = fxc.load(request.model, device=request.device, backend=request.backend)
            folder: Path | None = Path(request.model)
        else:
            loaded = load_source(
                request.model,
                revision=request.revision,
                dtype=request.dtype,
                trust_remote_code=request.trust_remote_code,
                device=request.device,
            )
            model, folder = loaded.model, loaded.tokenizer_dir
    if not hasattr(model, "generate"):
        raise UsageError(
            "only causal language models have a perplexity",
            where=request.model,
            hint="--against ORIGINAL measures how near a compiled encoder or vision model is to its original",
        )
    measured = _perplexity(model, folder, request, text, output)
    output.line(f"perplexity {measured.value:.4f} over {measured.tokens:,} tokens in windows of {measured.window}")
    return {"perplexity": measured.value, "tokens": measured.tokens, "window": measured.window}


def _perplexity(model: Any, folder: Path | None, request: EvalRequest, text: str, output: Output) -> quality.Perplexity:
    tokens = quality.encode(quality.tokenizer_of(folder), text)
    return quality.perplexity(
        model, tokens, request.window, limit=request.windows, track=lambda items: output.track(items, "perplexity")
    )


def _agreement_of(request: EvalRequest, text: str | None, output: Output) -> dict[str, Any]:
    (model, folder), (original, other) = (
        _as_program(request, source, output) for source in (request.model, request.against)
    )
    causal = original.program.metadata.get("kind") == "causal_lm"
    tokenizer = quality.tokenizer_of(other or folder) if text is not None else None
    inputs, of = quality.inputs_for(original.program, tokenizer, text, request.window, request.windows)
    found = quality.agreement(model, original, inputs, track=lambda items: output.track(items, "comparing outputs"))
    with output.doing("comparing layers"):
        layers = quality.layer_agreement(model.program, original.program, inputs[:_LAYER_INPUTS])
    result: dict[str, Any] = {"against": request.against, "inputs": of, "outputs": found}
    output.table(
        f"agreement at the output, over {of}", ["measure", ">value"], [(k, f"{v:.6f}") for k, v in found.items()]
    )
    changed = [layer for layer in layers if layer.own > 0]
    rows = [(each.name, f"{each.own:.5f}", f"{each.accumulated:.5f}") for each in changed[:_LARGEST_LAYERS]]
    output.table("relative error by layer", ["layer", ">own", ">accumulated"], rows)
    output.line(f"{len(changed)} of {len(layers)} layers differ by themselves; {len(rows)} are shown")
    if causal and text is not None:
        before, after = (_perplexity(m, other or folder, request, text, output) for m in (original, model))
        relative, error = quality.change(before, after)
        output.line(f"perplexity {before.value:.4f} -> {after.value:.4f}: {relative:+.3%} ± {error:.3%}")
        result |= {"perplexity": after.value, "perplexity_against": before.value, "tokens": after.tokens}
        result |= {"window": after.window, "perplexity_change": relative, "perplexity_change_standard_error": error}
    return result | {"layers": [dataclasses.asdict(layer) for layer in layers]}


def _as_program(request: EvalRequest, source: str, output: Output) -> tuple[CompiledModel, Path | None]:
    """`source` as a compiled model, uncompressed unless it is an artifact, and where its tokenizer is."""
    with output.doing(f"loading {source}"):
        if kind_of(source) == "artifact":
            return fxc.load(source, device=request.device, backend=request.backend), Path(source)
        captured = capture_source(
            source, dtype=request.dtype, revision=request.revision, trust_remote_code=request.trust_remote_code
        )
    plain = compiled_model(
        captured.program,
        {},
        config=captured.config,
        files=captured.files,
        device=request.device,
        backend=request.backend,
    )
    return plain, _folder_of(captured)


# ------------------------------------------------------------------------------------------------------ inspect and diff


def inspect_model(
    output: Output, source: str, text: bool, every: bool, revision: str | None, trust_remote_code: bool
) -> None:
    program, report = _program(output, source, revision, trust_remote_code)
    if text and not output.as_json:
        output.block(str(program).rstrip("\n"))
        return
    kinds, layers, operators = sizes.bytes_by_kind(program), sizes.layers(program), sizes.operators(program)
    metadata = program.metadata
    output.line(
        f"{metadata.get('class')} ({metadata.get('kind')}): {program.numel():,} parameters, {size(program.nbytes())}"
    )
    if report.get("passes"):
        output.line(f"passes: {', '.join(p['name'] for p in report['passes'])}; coverage {report['coverage']:.1%}")
    output.line(f"inputs: {', '.join(i.name for i in program.signature.inputs)}")
    total = max(program.nbytes(), 1)
    output.table(
        "bytes by kind", ["kind", ">bytes", ">share"], [(k, size(n), f"{n / total:.1%}") for k, n in kinds.items()]
    )
    shown = layers if every else layers[:_LARGEST_LAYERS]
    rows = [(each.name, each.kind, each.dtypes, f"{each.parameters:,}", size(each.nbytes)) for each in shown]
    output.table("layers", ["layer", "kind", "dtypes", ">parameters", ">bytes"], rows)
    if len(layers) > len(shown):
        output.line(f"and {len(layers) - len(shown)} smaller ones (--all)")
    output.table("operators", ["operator", ">calls"], list(operators.items()))
    output.json(
        {
            "class": metadata.get("class"),
            "kind": metadata.get("kind"),
            "parameters": program.numel(),
            "bytes": program.nbytes(),
            "bytes_by_kind": kinds,
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "operators": operators,
            "report": report,
        }
        | ({"text": str(program)} if text else {})
    )


def diff_models(output: Output, a: str, b: str, trust_remote_code: bool) -> None:
    before, after = (_program(output, source, None, trust_remote_code)[0] for source in (a, b))
    text = difference(str(before), str(after), (a, b))
    kinds = sizes.bytes_by_kind(before), sizes.bytes_by_kind(after)
    output.block(text.rstrip("\n") if text else "the programs are the same")
    names = dict.fromkeys([*kinds[0], *kinds[1]])
    rows = [(k, *(size(s[k]) if k in s else "-" for s in kinds)) for k in names]
    rows.append(("all", size(before.nbytes()), size(after.nbytes())))
    output.table("bytes by kind", ["kind", ">a", ">b"], rows)
    output.json(
        {"a": a, "b": b, "same": not text, "diff": text, "bytes_a": before.nbytes(), "bytes_b": after.nbytes(),
         "bytes_by_kind_a": kinds[0], "bytes_by_kind_b": kinds[1]}
    )  # fmt: skip


def _program(
    output: Output, source: str, revision: str | None, trust_remote_code: bool
) -> tuple[Program, dict[str, Any]]:
    from fxc.runtime import artifact

    with output.doing(f"reading {source}"):
        if kind_of(source) == "artifact":
            found = artifact.read(source)
            return found.program, found.manifest.get("report", {})
        return capture_source(source, revision=revision, trust_remote_code=trust_remote_code, check=False).program, {}


# --------------------------------------------------------------------------------------------------------------- passes


def list_passes(output: Output) -> None:
    listed = [_described(cls) for _, cls in sorted(Pass.registry.items())]
    for each in listed:
        output.line(f"{each['name']} ({each['kind']})")
        output.line(f"    {each['doc']}")
        for option in each["options"]:
            output.line(f"    {option['name']}={option['default']}  {option['values']}")
        for relation in ("needs", "gives", "breaks"):
            if each[relation]:
                output.line(f"    {relation} {', '.join(each[relation])}")
    output.json({"passes": listed})


def _described(cls: type[Pass]) -> dict[str, Any]:
    options = [
        {"name": f.name, "default": str(f.default).lower() if f.type == "bool" else f.default, "values": str(f.type)}
        for f in dataclasses.fields(cls)
    ]
    return {
        "name": cls.name,
        "kind": "policy" if cls.is_policy else "mechanism",
        "doc": " ".join((cls.__doc__ or "").split()),
        "options": options,
        **{relation: sorted(map(str, getattr(cls, relation))) for relation in ("needs", "gives", "breaks")},
    }


def explain_passes(output: Output, spec: str) -> None:
    ordered = order(parse_passes(spec))
    steps = [{"name": str(p), "reasons": r} for p, r in zip(ordered.passes, ordered.reasons, strict=True)]
    for number, step in enumerate(steps, 1):
        output.line(f"{number}. {step['name']}")
        for reason in step["reasons"]:
            output.line(f"    {reason}")
    output.json({"order": steps})


# ----------------------------------------------------------------------------------------------------- bench and doctor


def bench_models(
    output: Output,
    models: list[str],
    batches: list[int],
    lengths: list[int],
    new: int,
    rounds: int,
    threads: int | None,
    backend: str,
    device: str | None,
    dtype: str,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    entries = []
    for source in models:
        with output.doing(f"loading {source}"):
            entries += bench.contenders(
                source, backend=backend, device=device, dtype="auto" if kind_of(source) == "artifact" else dtype
            )
    with output.doing("timing"):
        rows = bench.race(entries, batches, lengths, new=new, rounds=rounds, device=device)
    results = []
    for row in rows:
        baseline = next(r for r in rows if (r.batch, r.seq) == (row.batch, row.seq))
        medians = {phase: row.median(phase) for phase in row.milliseconds}
        speedups = {phase: row.speedup(phase, baseline) for phase in row.milliseconds}
        results.append(
            {"name": row.contender.name, "how": row.contender.how, "bytes": row.contender.nbytes, "batch": row.batch,
             "seq": row.seq, "milliseconds": medians, "speedup": speedups, "rounds": row.milliseconds}
        )  # fmt: skip
    phases = list(rows[0].milliseconds)
    table = [
        (r["name"], r["how"], size(r["bytes"]), r["batch"], r["seq"] or "-",
         *(f"{r['milliseconds'][p]:.2f}" for p in phases), *(f"x{r['speedup'][p]:.2f}" for p in phases))
        for r in results
    ]  # fmt: skip
    where = f"{device or 'cpu'}, {torch.get_num_threads()} threads, median of {rounds} rounds"
    output.table(
        f"milliseconds ({'decode: for a token; ' if 'decode' in phases else ''}{where})",
        [
            "model",
            "runs as",
            ">weights",
            ">batch",
            ">seq",
            *(f">{p}" for p in phases),
            *(f">{p} speed" for p in phases),
        ],
        table,
    )
    output.json({"device": device or "cpu", "threads": torch.get_num_threads(), "new": new, "results": results})


def examine_machine(output: Output) -> None:
    findings = machine.examine()
    marks = {True: "ok", False: "no", None: ""}
    rows = [(f.group, f.name, f.value, marks[f.ok], f.note) for f in findings]
    output.table("this machine", ["", "", "", "", "note"], rows)
    output.json({"findings": [dataclasses.asdict(f) for f in findings]})
