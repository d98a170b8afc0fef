"""Measurements of earlier processes on this machine: one JSON file for each kind of machine, in the cache folder.

    $FXC_CACHE (default: $XDG_CACHE_HOME/fxc or ~/.cache/fxc) / timings-<hash>.json
    {"about": "AMD EPYC; avx512_vnni, ...; torch 2.13.0; 2 threads",
     "layers": {"int8 whole bfloat16 4096x4096": {"1": [3e-4, 5e-4], "16": [...]}}}

FXC_CACHE=off keeps nothing and reads nothing. A file that is damaged, or that cannot be written, is as good as none: what it
would have said is measured again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
from pathlib import Path

import torch

from fxc_kernels.cache import folder

Timing = dict[int, tuple[float, ...]]
"""rows -> seconds of each form, the last of which is float"""


def machine(threads: int) -> str:
    """What the time of a product depends on besides its size."""
    flags = ", ".join(sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "all"
    native = os.environ.get("FXC_CPU_LEVEL") or "all"
    return f"{cpu_name()}; {flags}; oneDNN up to {limit}, native up to {native}; torch {torch.__version__}; {threads} threads"


@functools.cache
def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def recall(layer: str, threads: int) -> Timing | None:
    """What was measured of `layer` on a machine like this one."""
    path = _path(threads)
    found = {} if path is None else _read(path).get(layer)
    if not isinstance(found, dict) or not found:
        return None
    try:
        timing = {int(rows): tuple(map(float, times)) for rows, times in found.items()}
    except (TypeError, ValueError):
        return None
    return timing if all(0 < s < math.inf for times in timing.values() for s in times) else None


def keep(layer: str, threads: int, timing: Timing) -> None:
    """Add what was measured. Of two processes that write at once one may lose its entry, and the file is whole all the same."""
    path = _path(threads)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = _read(path) | {layer: timing}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"about": machine(threads), "layers": layers}, file)
        os.replace(file.name, path)


def _path(threads: int) -> Path | None:
    place = folder()
    if place is None:
        return None
    return place / f"timings-{hashlib.sha256(machine(threads).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict:
    try:
        layers = json.loads(path.read_text())["layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return layers if isinstance(layers, dict) else {}
