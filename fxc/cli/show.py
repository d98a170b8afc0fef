"""fxc inspect, diff, passes and doctor: commands that change and measure nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxc.analysis import sizes
from fxc.artifact import store
from fxc.captured import capture_source
from fxc.ir.program import Program
from fxc.lower.target import check_target, preview
from fxc.options import Options
from fxc.passes.base import Context, Pass, options_of, parse_passes
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.order import order
from fxc.plugins import FAILED, named_in, origin_of
from fxc.report import axes as coupled
from fxc.report import lowering, machine
from fxc.report.console import Output, size
from fxc.report.difference import unified_diff
from fxc.report.explain import as_text, explained
from fxc.schemes.parameters import parameters
from fxc.source.load import kind_of

_LARGEST_LAYERS = 15


def inspect_model(
    output: Output, source: str, text: bool, axes: bool, every: bool, revision: str | None, trust_remote_code: bool
) -> None:
    program, report = _program(output, source, revision, trust_remote_code)
    if axes:
        with output.doing("following axes"):
            Canonicalize().run(program, Context())
        coupled.show(output, program, every)
        output.json({"groups": coupled.as_json(program)})
        return
    if text and not output.as_json:
        output.block(str(program).rstrip("\n"))
        return
    kinds, layers, operators = sizes.bytes_by_kind(program), sizes.layers(program), sizes.operators(program)
    metadata = program.metadata
    what = f"{parameters(program):,} parameters, {size(program.nbytes())}"
    output.line(f"{metadata.get('class')} ({metadata.get('kind')}): {what}")
    if steps := [p["name"] for p in report.get("passes", []) if "name" in p]:
        output.line(f"passes: {', '.join(map(str, steps))}")
    if plugins := named_in(report):
        output.line(f"plugins: {', '.join(plugins.values())}")
    output.line(f"inputs: {', '.join(i.name for i in program.signature.inputs)}")
    total = max(program.nbytes(), 1)
    output.table("bytes by kind", ["kind", ">bytes", ">share"], [(k, size(n), f"{n / total:.1%}") for k, n in kinds.items()])
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
            "parameters": parameters(program),
            "bytes": program.nbytes(),
            "bytes_by_kind": kinds,
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "operators": operators,
            "report": report,
        }
        | ({"text": str(program)} if text else {})
    )


def inspect_lowered(
    output: Output, source: str, device: str | None, backend: str, revision: str | None, trust_remote_code: bool
) -> None:
    check_target(device, backend, needs_gpu=False)
    on = torch.device(device or "cpu")
    program, _ = _program(output, source, revision, trust_remote_code)
    with output.doing(f"lowering for {on}"):
        lowered, layers = preview(program, on, backend)
    output.block(str(lowered).rstrip("\n"))
    for line in lowering.describe(layers):
        output.line(line)
    output.line(lowering.describe_held(lowered))
    about = {"text": str(lowered), "layers": [dataclasses.asdict(layer) for layer in layers]}
    output.json(about | lowering.held_as_json(lowered))


def diff_models(output: Output, a: str, b: str, trust_remote_code: bool) -> None:
    before, after = (_program(output, source, None, trust_remote_code)[0] for source in (a, b))
    text = unified_diff(str(before), str(after), (a, b))
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


def _program(output: Output, source: str, revision: str | None, trust_remote_code: bool) -> tuple[Program, dict[str, Any]]:
    with output.doing(f"reading {source}"):
        if kind_of(source) == "artifact":
            found = store.read(source)
            return found.program, found.manifest.get("report", {})
        options = Options(revision=revision, trust_remote_code=trust_remote_code, verify=False)
        return capture_source(source, options=options).program, {}


def list_passes(output: Output) -> None:
    listed = [_described(cls) for _, cls in sorted(Pass.registry.items())]
    for each in listed:
        of = f", of {' '.join(each['plugin'].values())}" if "plugin" in each else ""
        output.line(f"{each['name']} ({each['kind']}{of})")
        output.line(f"    {each['doc']}")
        for option in each["options"]:
            output.line(f"    {option['name']}={option['default']}  {option['values']}")
        for relation in ("needs", "gives", "breaks", "owes"):
            if each[relation]:
                output.line(f"    {relation} {', '.join(each[relation])}")
    for module, why in FAILED.items():
        output.warn(f"the plugin {module} could not be imported: {why}")
    output.json({"passes": listed, "failed_plugins": FAILED})


def _described(cls: type[Pass]) -> dict[str, Any]:
    options = [
        {"name": f.name, "default": str(f.default).lower() if f.type == "bool" else f.default, "values": str(f.type)}
        for f in options_of(cls)
    ]
    usual = cls()  # what a pass needs may depend on its options
    return {
        "name": cls.name,
        "kind": "policy" if cls.is_policy else "mechanism",
        "doc": " ".join((cls.__doc__ or "").split()),
        "options": options,
        **{relation: sorted(map(str, getattr(usual, relation))) for relation in ("needs", "gives", "breaks", "owes")},
    } | ({"plugin": origin} if (origin := origin_of(cls)) else {})


def explain_passes(output: Output, spec: str) -> None:
    ordered = order(parse_passes(spec))
    steps = [{"name": str(p), "reasons": r} for p, r in zip(ordered.passes, ordered.reasons, strict=True)]
    for number, step in enumerate(steps, 1):
        output.line(f"{number}. {step['name']}")
        for reason in step["reasons"]:
            output.line(f"    {reason}")
    output.json({"order": steps})


def examine_machine(output: Output, build: bool = False) -> None:
    """build: build the kernels in C++ first. Raises ResourceError where that fails."""
    built = {}
    if build:
        with output.doing("building kernels in C++"):
            built = machine.build_kernels()
    findings = machine.examine()
    marks = {True: "ok", False: "no", None: ""}
    rows = [(f.group, f.name, f.value, marks[f.ok], f.note) for f in findings]
    output.table("this machine", ["area", "what", "found", "", "note"], rows)
    for level, files in built.items():
        output.line(f"built for {level}: {', '.join(files)}, in {next(iter(files.values())).parent}")
    paths = {level: {kernel: str(file) for kernel, file in files.items()} for level, files in built.items()}
    output.json({"findings": [dataclasses.asdict(f) for f in findings]} | ({"built": paths} if build else {}))


def explain_code(output: Output, code: str) -> None:
    each = explained(code)
    output.block(as_text(each) + "\n")
    cases = [{"what": what, "cure": cure} for what, cure in each.cases]
    output.json({"code": each.code, "kind": each.kind.__name__, "meaning": each.meaning, "cases": cases})
