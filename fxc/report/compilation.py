"""The tables that `fxc compile` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from fxc.analysis.groups import NAMES
from fxc.compilation import Compilation, Stage, Step, decibels
from fxc.passes.base import Removal
from fxc.report.chart import curve
from fxc.report.console import Output, ratio, size

LOW_COVERAGE = 0.5
_WORST = 5
_WORST_IN_SHORT = 3


def show(
    output: Output, record: Compilation, disk: tuple[int, int], memory: tuple[int, int], packed: Collection[str]
) -> None:
    """Print the report of a compilation in short: what it is worth, pass by pass. disk, memory: bytes (before, after); packed:
    the layers whose weights are packed in the end."""
    pairs = (("size on disk", disk), ("weights", memory))
    output.line("; ".join(f"{name} {size(a)} -> {size(b)} ({ratio(b, a)})" for name, (a, b) in pairs))
    if losses := record.perplexity:
        change = change_text(losses.change, losses.standard_error)
        output.line(f"perplexity {losses.before:.3f} -> {losses.after:.3f}, {change}")
    stages = record.stages or _unmeasured(record, memory[0])
    phases = list(dict.fromkeys(phase for s in stages for phase in s.milliseconds or ()))
    has_perplexity = any(s.perplexity is not None for s in stages)
    changed = {p.name: f"{p.changed:,}" for p in record.passes}
    header = ["after", ">changed", ">parameters", ">weights", *(f">{p}, ms" for p in phases)]
    rows = [
        (
            s.name, changed.get(s.name, ""), f"{s.parameters:,}", size(s.bytes),
            *(f"{s.milliseconds[p]:.2f}" for p in phases), *([f"{s.perplexity:.3f}"] if has_perplexity else []),
        )
        for s in stages
    ]  # fmt: skip
    output.table("pass by pass", [*header, *([">perplexity"] if has_perplexity else [])], rows)
    if gone := _gone(record):
        output.line(f"removed: {gone}")
    for step in record.passes:
        for note in step.notes:
            output.line(f"{step.name}: {note}")
        if step.training and (lines := curve(step.training)):
            output.line("the loss on held-out samples:")
            output.block("\n".join(f"  {line}" for line in lines))
    if any(p.covered_bytes for p in record.passes):
        output.line(coverage_text(record, packed))
    if worst := _worst_text(record):
        output.line(worst)


def _unmeasured(record: Compilation, nbytes: int) -> list[Stage]:
    """The stages, where nothing was measured of them. nbytes: of the model as captured."""
    done = [p for p in record.passes if p.changed]
    first = Stage("as captured", nbytes, record.parameters_before)
    return [first, *(Stage(p.name, p.bytes_after, p.parameters_after) for p in done)]


def _gone(record: Compilation) -> str:
    """ "12 of 96 heads, 662 of 3,840 ffn channels" """
    totals: dict[str, list[int]] = {}
    for each in _removed(record):
        of_kind = totals.setdefault(each.kind, [0, 0])
        of_kind[0] += each.removed
        of_kind[1] += each.before
    return ", ".join(f"{n:,} of {of:,} {NAMES.get(kind, kind)}s" for kind, (n, of) in totals.items())


def show_all(output: Output, record: Compilation, kinds: tuple[dict[str, int], dict[str, int]]) -> None:
    """Print the tables behind the short report. kinds: bytes by kind (before, after)."""
    names = sorted({*kinds[0], *kinds[1]}, key=lambda name: -max(kinds[0].get(name, 0), kinds[1].get(name, 0)))
    output.table(
        "bytes by kind",
        ["kind", ">before", ">after"],
        [(k, *(size(s[k]) if k in s else "-" for s in kinds)) for k in names],
    )
    removed = [(r.scope or "the model", r.kind, r.before, r.before - r.removed) for r in _removed(record)]
    output.table("removed", ["module", "kind", ">before", ">after"], removed)
    passes = [(p.name, f"{p.seconds:.2f}", _gates(p.gates), p.gates.get("meaning", "not run")) for p in record.passes]
    output.table("passes", ["pass", ">seconds", "gates", "meaning"], passes)
    skipped = [row for p in record.passes for row in _refusals(p)]
    output.table("left alone", ["pass", ">layers", ">weights", "why", "which"], skipped)
    rows = [
        (each.layer, each.by, f"{each.error:.4f}", f"{decibels(each.error):.1f}", *map(_share, (each.saturation, each.cut_off)))
        for each in record.worst(_WORST)
    ]
    header = ["layer", "pass", ">error", ">signal to noise, dB", ">weights at the ends of their range", ">activations beyond"]
    output.table(f"largest relative errors of single layers, {_judged_on(record)}", header, rows)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3%}"


def _judged_on(record: Compilation) -> str:
    """On which inputs layers were measured."""
    return " and ".join(dict.fromkeys(f"on {p.judged_on}" for p in record.passes if p.judged_on))


def _worst_text(record: Compilation) -> str:
    """The worst layers in a line."""
    named = ", ".join(f"{each.layer} {decibels(each.error):.1f} dB" for each in record.worst(_WORST_IN_SHORT) if each.error)
    return f"worst layers by signal to noise, {_judged_on(record)}: {named}" if named else ""


def _removed(record: Compilation) -> list[Removal]:
    """The units that went; of what was first masked and then removed the removal counts."""
    told = {(r.scope, r.kind): r for p in record.passes for r in p.removed}
    return list(told.values())


def change_text(relative: float, error: float | None) -> str:
    """A relative change with its standard error, where there is one."""
    return f"{relative:+.3%}" + (f" ± {error:.3%} (standard error)" if error is not None else "")


def coverage_text(record: Compilation, packed: Collection[str] = ()) -> str:
    refused = len({r.fqn for p in record.passes for r in p.refusals} - set(packed))
    left = f"{refused} layer{'s' * (refused != 1)} left alone, --report says why" if refused else "no layer was left alone"
    return f"coverage: {record.coverage:.1%} of the weight bytes were rewritten; {left}"


def why_so_little(record: Compilation) -> str:
    """The reasons for which layers were left alone, or that there were few layers to rewrite."""
    rows = [row for p in record.passes for row in _refusals(p)]
    named = "; ".join(f"{count} layers: {reason} ({which})" for _, count, _, reason, which in rows[:5])
    return named or "most of the bytes are not in layers that the passes rewrite"


def as_json(record: Compilation, out: str, disk: tuple[int, int]) -> dict[str, Any]:
    """The object of `fxc compile --json`; its passes begin with those that an artifact went through before, without times.
    disk: bytes on disk (before, after)."""
    report = record.as_json()
    keys = ("bytes_before", "bytes_after", "parameters_before", "parameters_after", "coverage", "passes")
    gates = {p["name"]: p["gates"] for p in report["passes"] if "gates" in p}
    perplexity = {"perplexity": report["perplexity"]} if record.perplexity else {}
    stages = [stage.as_json() for stage in record.stages]
    own = {"gates": gates, "out": out, "disk_before": disk[0], "disk_after": disk[1]}
    return {key: report[key] for key in keys} | own | perplexity | {"stages": stages}


def _gates(gates: dict[str, str]) -> str:
    if not gates:
        return "not run"
    passed = sum(outcome.startswith("ok") for outcome in gates.values())
    return f"{passed} of {len(gates)} ok"


def _refusals(step: Step) -> list[tuple[str, int, str, str, str]]:
    """One row for each reason, with the first few layers that it holds for."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    nbytes: defaultdict[str, int] = defaultdict(int)
    for refusal in step.refusals:
        nbytes[refusal.reason] += refusal.bytes
        by_reason[refusal.reason].append(refusal.fqn)
    rows = []
    for reason, fqns in by_reason.items():
        more = f" and {len(fqns) - 3} more" if len(fqns) > 3 else ""
        weights = size(nbytes[reason]) if nbytes[reason] else "-"
        rows.append((step.name, len(fqns), weights, reason, ", ".join(fqns[:3]) + more))
    return rows
