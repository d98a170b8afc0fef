"""fxc bench kernels."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fxc.errors import ResourceError, UsageError, VerificationFailed
from fxc.kernel_bench import peers, report
from fxc.kernel_bench.files import slug
from fxc.kernel_bench.run import Platform, Result, Sweep, run
from fxc.kernel_bench.shapes import Shape, parse_shapes
from fxc.kernel_bench.summary import headlines, summarise
from fxc.kernel_bench.weights import ALIASES, all_schemes, unfit

if TYPE_CHECKING:
    from fxc.report.console import Output

DEFAULT_SCHEMES = ("int8", "int8_weight_only", "int4_g128", "fp8", "sparse24", "int8_sparse24")
# The largest weight, of the vocabulary, is left out on a CPU, where it would take most of the time and of the memory.
DEFAULT_SHAPES = {"cpu": "qwen2.5-7b:o,qwen2.5-7b:qkv,qwen2.5-7b:down,qwen2.5-7b:gate_up", "cuda": "qwen2.5-7b"}
DEFAULT_ROWS = {"cpu": (1, 16, 64, 256), "cuda": (1, 16, 64, 256, 2048, 8192)}
DEFAULT_ROUNDS = {"cpu": 5, "cuda": 15}
# Of the time that there is, what compiling configurations before anything is measured may take.
COMPILING_SHARE = 0.4
# And what measuring the machine may.
PEAKS_SHARE = 0.2


@dataclass(frozen=True)
class KernelsRequest:
    """schemes, shapes: as they were written, None for the defaults; rows, rounds: None or empty for the device's defaults;
    seconds: after these no new cell is begun; a share of them is for measuring what the machine can; peers: a module with
    rivals, see `fxc.kernel_bench.peers`; threads: as many runs, one after the other, each beside what the machine gives so many
    threads."""

    schemes: str | None = None
    shapes: str | None = None
    rows: tuple[int, ...] = ()
    device: str | None = None
    threads: tuple[int, ...] = ()
    rounds: int | None = None
    out: Path | None = None
    tune: bool = False
    seconds: float | None = None
    peers: str | None = None


def bench_kernels(output: Output, request: KernelsRequest) -> list[Result]:
    """Check and time linear layers, print what came out, and write it to files kernels-<machine>.* in `request.out`, or for
    several numbers of threads to kernels-<machine>-<threads>-threads.*.

    Raises, after everything was printed and written, VerificationFailed when a product of fxc was wrong and ResourceError when
    nothing could be measured; before it, UsageError.
    """
    began = time.monotonic()
    if request.out is not None:
        _make_writable(request.out)
    if request.threads and max(request.threads) > (os.cpu_count() or 1):
        raise UsageError(
            f"{max(request.threads)} threads are more than this machine's {os.cpu_count()} cores", where="--threads"
        )
    kind = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if request.tune and kind != "cuda":
        raise UsageError("only kernels of a GPU have configurations to choose from", where="--tune", hint="add --device cuda")
    schemes = parse_schemes(request.schemes)
    shapes = parse_shapes(DEFAULT_SHAPES[kind] if request.shapes is None else request.shapes)
    if request.schemes is not None:
        _check(schemes, shapes)
    before, results, printed = torch.get_num_threads(), [], []
    deadline = began + request.seconds if request.seconds else None
    try:
        for at, threads in enumerate(request.threads or (before,)):
            torch.set_num_threads(threads)
            until = None
            if deadline is not None:  # of what is left, each run that is still to come has as much
                now = time.monotonic()
                until = now + max(deadline - now, 0.0) / (max(len(request.threads), 1) - at)
            suffix = f"-{threads}-threads" if len(request.threads) > 1 else ""
            result, found = _bench(output, request, kind, schemes, shapes, until, suffix)
            results.append(result)
            printed.append(found)
    finally:
        torch.set_num_threads(before)
    output.json(printed[0] if len(printed) == 1 else {"runs": printed})
    _judge(results)
    return results


def _bench(
    output: Output, request: KernelsRequest, kind: str, schemes: tuple[str, ...], shapes: tuple[Shape, ...],
    deadline: float | None, suffix: str,
) -> tuple[Result, dict]:  # fmt: skip
    """One run with the threads that torch has: what came out, and the same as JSON."""
    began = time.monotonic()
    platform = platform_of(kind, request.device)
    rivals = peers.load(request.peers, schemes, platform) if request.peers else []
    packages = (*report.PACKAGES, *dict.fromkeys(name for each in rivals for name in each.needs))
    sweep = Sweep(shapes, schemes, request.rows or DEFAULT_ROWS[kind], request.rounds or DEFAULT_ROUNDS[kind], deadline)
    about = platform.about()
    with output.doing("measuring what this machine can"):
        left = inf if deadline is None else max(deadline - time.monotonic(), 0.0)
        peaks = (platform.datasheet(), platform.measured_peaks(PEAKS_SHARE * left))
    output.note(report.peaks_text(peaks))
    tuner = _tuner(platform, sweep, output) if request.tune else None
    protocol = {"rounds": sweep.rounds, "threads": about.get("threads"), "load before": about.get("load_before")}
    stem = request.out / f"kernels-{slug(about['name'])}{suffix}" if request.out else None

    def found(result: Result) -> report.Report:
        spent = {"seconds": round(time.monotonic() - began, 1)}
        return report.Report(result, about, protocol | spent, peaks, tuner.failed if tuner else None, packages)

    def save(result: Result) -> None:
        try:
            if stem:
                report.write(stem, found(result), draw=False)
        except OSError as error:  # what is still to be measured can be printed
            output.note(f"not written: {error}")

    whole = found(run(sweep, platform, output.note, tuner, peaks, save, rivals))
    _print(output, whole)
    if not request.peers:
        output.line(peers.WHERE)
    if stem:
        try:
            written, missing = report.write(stem, whole)
        except OSError as error:
            raise ResourceError("the results cannot be written", where=stem.parent, why=error.strerror) from error
        for path in written:
            output.note(f"wrote {path}")
        if missing:
            output.note(missing)
    return whole.result, report.as_json(whole)


def _judge(results: list[Result]) -> None:
    if not any(result.rows for result in results):
        first = results[0].skipped[0]
        raise ResourceError("nothing was measured", where=first.what, why=first.reason, hint="smaller shapes, or more time")
    wrong = [row for result in results for row in result.rows if row.ours and row.state == "wrong"]
    if wrong:
        first = wrong[0]
        raise VerificationFailed(
            f"{len(wrong)} products of fxc are wrong",
            where=f"{first.contender} at {first.n} x {first.k}, M={first.m}",
            why=first.reason,
            hint="a kernel or its configuration is at fault: report it, with the files that --out writes",
        )


def _make_writable(folder: Path) -> None:
    """Raises UsageError, before anything is measured, for a folder that takes no files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} takes no results", where="--out", why=error.strerror, hint="a folder that can be written to"
        ) from error


def parse_schemes(text: str | None) -> tuple[str, ...]:
    """Raises UsageError for a name that is no scheme."""
    if text is None:
        return DEFAULT_SCHEMES
    names = [ALIASES.get(part.strip(), part.strip()) for part in text.split(",")]
    for name in names:
        if name not in all_schemes():
            known = ", ".join([*all_schemes(), *(f"{short} for {full}" for short, full in ALIASES.items())])
            raise UsageError(f"there is no scheme {name!r}", where="--scheme", hint=f"one of {known}")
    return tuple(dict.fromkeys(names))


def _check(schemes: tuple[str, ...], shapes: tuple[Shape, ...]) -> None:
    """Of schemes that were asked for by name, one that a shape cannot have is an error."""
    for shape in shapes:
        for scheme in schemes:
            if reason := unfit(scheme, shape):
                raise UsageError(
                    f"a weight of {shape.n} x {shape.k} cannot be {scheme}",
                    where="--scheme",
                    why=reason,
                    hint="leave the scheme or the shape out; without --scheme what does not fit is skipped",
                )


def platform_of(kind: str, device: str | None) -> Platform:
    if kind == "cpu":
        from fxc.kernel_bench.cpu_platform import CpuPlatform

        return CpuPlatform()
    from fxc.kernel_bench.cuda_platform import CudaPlatform

    index = torch.device(device or "cuda").index
    return CudaPlatform(torch.device("cuda", torch.cuda.current_device() if index is None else index))


def _tuner(platform: Platform, sweep: Sweep, output: Output):
    from fxc.kernel_bench import tune

    now, until = time.monotonic(), None
    if sweep.deadline is not None:
        until = now + COMPILING_SHARE * (sweep.deadline - now)
    with output.doing("compiling configurations"):
        compiled = tune.precompile(sweep.schemes, sweep.shapes, sweep.rows, platform.capability, output.note, until)
    return tune.Choices(platform, platform.capability, sweep.schemes, output.note, sweep.deadline, compiled=compiled)


def _print(output: Output, whole: report.Report) -> None:
    result, about = whole.result, whole.about
    for title, rows in report.shapes_of(result).items():
        ms = sorted({row.m for row in rows})
        what = f"{title} on {about['name']}: microseconds, times faster than dense bf16, share of the roofline"
        output.table(what, ["scheme", "", *(f">M={m}" for m in ms)], report.shape_cells(rows, ms))
        output.line()
    lines = headlines(summarise(result.rows))
    by = f"by {lines[0].peaks} peaks" if lines else ""
    title = f"summary of fxc and its fastest rivals: geometric means and worst cells, roofline {by}"
    output.table(title, report.SUMMARY, report.summary_cells(lines))
    facts = [about["timing"], about["weights"], report.peaks_text(whole.peaks), report.telemetry_text(result)]
    for line in [*filter(None, facts), *report.remarks(result)]:
        output.line(line)
