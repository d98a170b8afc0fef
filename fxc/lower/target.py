"""Choose the lowering for a device."""

from __future__ import annotations

from typing import Any

import torch

from fxc.errors import UsageError, first_line
from fxc.ir.program import Program
from fxc.lower import choose
from fxc.lower.cpu import lower_cpu, lower_to_kernels
from fxc.lower.siblings import LayerChoice
from fxc_kernels.cpu import native

BACKENDS = ("eager", "inductor", "aoti")
NEWEST = 90
"""The compute capability that a preview for CUDA is made for: 9.0, of an H100 or H200."""


def check_target(device: torch.device | str | None, backend: str | None, needs_gpu: bool = True) -> None:
    """Raise `UsageError` for a backend or a device that does not exist, or not on this machine. None: the default of each.

    needs_gpu: whether a CUDA device has to be there."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise UsageError(f"there is no backend {backend!r:.100}", hint=f"one of {', '.join(BACKENDS)}")
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"there is no device {device!r:.100}", why=first_line(error), hint="use device=cpu or device=cuda"
        ) from None
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"fxc does not run on {found.type}", hint="use device=cpu or device=cuda")
    if backend == "aoti" and found.type != "cpu":
        raise UsageError("the backend aoti is for a CPU", hint="use backend=inductor, or device=cpu")
    if found.type == "cpu":
        if found.index:
            raise UsageError(f"there is no device {device!r}", hint="use device=cpu")
        return
    if not torch.cuda.is_available():
        if not needs_gpu:
            return
        raise UsageError("this machine has no CUDA device that torch can use", hint="'fxc doctor' says why; use device=cpu")
    if (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {device!r}", hint=f"this machine has {torch.cuda.device_count()}")


def check_keep_float(device: torch.device | str | None, keep_float: float | None) -> None:
    """Raise `UsageError` for what is no share, and where a device has no use for one."""
    if keep_float is None:
        return
    if isinstance(keep_float, bool) or not isinstance(keep_float, int | float) or not 0 <= keep_float <= 1:
        raise UsageError(
            f"{keep_float!r:.100} is not a share of the saved bytes", where="keep_float", hint="a number from 0 to 1, as 0.1"
        )
    if torch.device(device or "cpu").type != "cpu":
        raise UsageError(
            "only a CPU holds layers in floats beside their compressed form", where="keep_float",
            hint="leave it out; keep_compressed=True keeps layers compressed on CUDA",
        )  # fmt: skip


def warm_up(device: torch.device | str | None) -> None:
    """Begin what the first lowering for `device` would wait for, which reading a model can go on beside."""
    if torch.device(device or "cpu").type == "cpu":
        native.start()


def lower(
    program: Program,
    device: torch.device,
    backend: str,
    keep_compressed: bool = False,
    keep_float: float | None = None,
    timings: choose.Timings | None = None,
) -> tuple[Program, list[LayerChoice]]:
    """`program` as `device` runs it, for `fxc.lower.runnable`, and what was chosen for each compressed layer.

    keep_compressed: run layers compressed also where their float form was measured to be faster.
    keep_float: on a CPU, of the bytes that compression saves, the share that floats may take again where they are faster; 1
    for None.
    timings: on a CPU, what was measured of forms already, and is not measured again; what is measured now is added to it.
    Raises `UsageError` for a backend or a device that does not exist, and for a format that the device has no product for.
    """
    check_target(device, backend)
    check_keep_float(device, keep_float)
    if backend == "aoti":
        return lower_to_kernels(program, in_floats=True)
    if device.type == "cpu":
        measure = choose.compressed if keep_compressed else choose.measured(backend, timings)
        return lower_cpu(program, backend, measure=measure, keep_float=1.0 if keep_float is None else keep_float)
    return _lower_cuda(program, device, backend, compressed=keep_compressed)


def preview(program: Program, device: torch.device, backend: str) -> tuple[Program, list[LayerChoice]]:
    """`lower`, to be read: for CUDA where this machine has no GPU too, as a chip of NEWEST that was not measured would run it.

    Raises `UsageError` as `lower` does, but for the GPU.
    """
    check_target(device, backend, needs_gpu=False)
    if device.type == "cuda" and not torch.cuda.is_available():
        return _lower_cuda(program, torch.device("cpu"), backend, capability=NEWEST)
    return lower(program, device, backend)


def _lower_cuda(program: Program, device: torch.device, backend: str, **options: Any) -> tuple[Program, list[LayerChoice]]:
    try:
        from fxc.lower.cuda import lower_cuda
    except ImportError as error:
        raise UsageError(
            "compressed layers need Triton on CUDA, which is not installed", why=error, hint="pip install triton"
        ) from error
    return lower_cuda(program, device, backend, **options)
