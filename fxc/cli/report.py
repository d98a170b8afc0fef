"""fxc report."""

from __future__ import annotations

from pathlib import Path

import fxc
from fxc.artifact import store
from fxc.artifact.manifest import PAGE, read_manifest
from fxc.artifact.staging import check_writable, write_file
from fxc.errors import UsageError
from fxc.page.page import page
from fxc.page.plots import MISSING, is_there
from fxc.report.console import Output, size

_PEAK_SECONDS = 4.0


def write_report(output: Output, artifact: Path, out: Path | None, timed: bool) -> None:
    """Write the page of an artifact, by default into it. Weights are read only to be timed."""
    read_manifest(artifact)
    target = artifact / PAGE if out is None else out
    if target.is_dir():
        raise UsageError("the output is a folder", where=target, hint=f"-o {target / PAGE}")
    inside = target.resolve().is_relative_to(artifact.resolve())
    if inside and target.resolve() != (artifact / PAGE).resolve():
        hint = f"leave -o out: it goes to {artifact / PAGE}"
        raise UsageError("an artifact holds its own files alone", where=target, hint=hint)
    check_writable(target)
    measured = None
    if timed:
        from fxc.kernel_bench.cpu_platform import CpuPlatform
        from fxc.measure.layers import measure

        with output.doing(f"loading {artifact}"):
            model = fxc.load(artifact)
        with output.doing("measuring what this machine is able to"):
            peaks = CpuPlatform().measured_peaks(_PEAK_SECONDS)
        fastest = max(filter(None, (peaks.float32, peaks.bf16, peaks.int8)), default=None)
        measured = measure(model, None if fastest is None else (peaks.bandwidth, fastest), output.track)
    with output.doing(f"reading {artifact}"):
        found = store.read_outline(artifact)
    html = page(found.program, found.manifest, measured)
    if not is_there():
        output.warn(MISSING)
    write_file(target, html)
    output.line(f"wrote {target}, {size(len(html))}")
    output.json({"out": str(target), "bytes": len(html), "plots": is_there()})
