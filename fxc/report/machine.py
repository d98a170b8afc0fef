"""What this machine can run, and where it cannot, why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fxc.errors import ResourceError, UsageError
from fxc.lower import candidates, choose
from fxc.lower.inductor import require_compiler
from fxc.lower.remembered import cpu_name
from fxc.schemes.scheme import SCHEMES
from fxc_kernels.cpu import (
    native,
    native_attention,
    native_between,
    native_int4,
    native_int4_quantize,
    native_int8,
    native_int8_quantize,
    native_rows,
)

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "triton",
    "numpy",
    "networkx",
    "typer",
    "rich",
    "pillow",
)
_KERNELS = {
    "int8 layers": native_int8, "int4 layers": native_int4, "attention": native_attention, "norms": native_between,
    "encoders": native_rows, "rounding to int4": native_int4_quantize, "rounding to int8": native_int8_quantize,
}  # fmt: skip
_OPTIONAL = {"pillow": "only for --image", "triton": "only for CUDA"}


@dataclass(frozen=True)
class Finding:
    """ok: True, False, or None for a fact that is neither good nor bad. note: why not, or what follows from it."""

    group: str
    name: str
    value: str
    ok: bool | None = None
    note: str = ""


def examine(folder: Path = Path(".")) -> list[Finding]:
    """All there is to know. folder: where output would go, for its free space."""
    return [*_software(), *_processor(), *_cuda(), *_compiler(), *_space(folder)]


def build_kernels() -> dict[str, dict[str, Path]]:
    """Level -> kernel in C++ -> its library in the cache folder. Raises ResourceError where one cannot be built."""
    try:
        return native.build_all()
    except native.NotBuilt as error:
        raise ResourceError(
            "the kernels in C++ were not built",
            where="--build",
            why=error,
            hint="install g++ or set CXX, and let FXC_CACHE name a folder that can be written",
        ) from error


def _software() -> list[Finding]:
    found = [Finding("software", "python", f"{platform.python_version()} ({sys.executable})")]
    for name in ("fxc", *PACKAGES):
        try:
            found.append(Finding("software", name, importlib.metadata.version(name), True))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("software", name, "missing", None if name in _OPTIONAL else False, _OPTIONAL.get(name, "")))
    return found


def _processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has = torch.cpu
    features = {
        "avx512": has._is_avx512_supported(),
        "avx512_bf16": has._is_avx512_bf16_supported(),
        "vnni": has._is_vnni_supported(),
        "amx": has._is_amx_tile_supported(),
    }
    onednn = torch.backends.mkldnn.is_available()
    found = [
        Finding(
            "cpu",
            "model",
            f"{cpu_name()}, {cores} cores for this process, torch uses {torch.get_num_threads()} threads",
        ),
        Finding("cpu", "memory", _memory()),
        *(Finding("cpu", name, "yes" if there else "no", there) for name, there in features.items()),
        Finding("cpu", "onednn", "yes" if onednn else "no", onednn, "" if onednn else "this build of torch has no oneDNN"),
    ]
    return [*found, _int8_path(), _native()]


def _native() -> Finding:
    refused = {name: each.why_not() for name, each in _KERNELS.items()}
    built = ", ".join(name for name, why in refused.items() if why is None)
    why = "; ".join(dict.fromkeys(why for why in refused.values() if why))
    if not built:
        return Finding("cpu", "kernels in C++", "none", False, f"{why}; layers run in the forms of torch and oneDNN")
    return Finding("cpu", "kernels in C++", f"{built}, for {native.level()}", True, why)


def _int8_path() -> Finding:
    native_why, onednn_why = native_int8.why_not(), candidates.why_no_onednn_int8()
    if native_why and onednn_why:
        why = f"{native_why}; {onednn_why}; files are smaller, speed is that of the float model"
        return Finding("cpu", "int8 layers", "dequantized once, when a model is loaded", False, why)
    form = candidates.INT8 if native_why else candidates.NATIVE_INT8
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    ((int8, dense),) = choose.compare((form, candidates.FLOAT), 1024, 1024, dtype, True, (64,))[0].values()
    name = str(dtype).removeprefix("torch.")
    value = f"exact products, layers {dense / int8:.1f} times as fast as in {name} (tried on 1024 x 1024, 64 rows)"
    note = "each layer is measured when a model is loaded, and runs in float where that is faster"
    return Finding("cpu", "int8 layers", value, True, note)


def _cuda() -> list[Finding]:
    if torch.cuda.is_available():
        return [finding for i in range(torch.cuda.device_count()) for finding in _device(i)]
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    elif not Path("/proc/driver/nvidia/version").exists():
        why = "there is no NVIDIA driver on this machine"
    else:
        why = f"the driver is there, and torch (CUDA {torch.version.cuda}) finds no device it can use: nvidia-smi says more"
    return [Finding("cuda", "device", "none", None, why)]


def _device(index: int) -> list[Finding]:
    """One GPU: what it is, which products it lacks, and whether its kernels were measured."""
    about = torch.cuda.get_device_properties(index)
    found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
    device = Finding("cuda", f"device {index}", found, True)
    if importlib.util.find_spec("triton") is None:
        return [device, Finding("cuda", "kernels", "none", False, "compressed layers need Triton: pip install triton")]
    from fxc_kernels.cuda import dispatch

    chip = dispatch.chip_of(torch.device("cuda", index))
    try:
        cells = sum(len(rows) for rows in dispatch.table(chip).values())
    except ValueError as error:
        return [device, Finding("cuda", "kernels", "a table that cannot be read", False, str(error))]
    note = "" if cells else f"{chip} was not measured: configurations are a rule of thumb, and no layer is left dense for speed"
    measured = Finding("cuda", "kernels", f"{cells} measured products in the table", bool(cells) or None, note)
    return [device, measured, *_lacking(10 * about.major + about.minor)]


def _lacking(capability: int) -> list[Finding]:
    """The products of formats that a chip of this compute capability does not have."""
    products = [product for scheme in SCHEMES.values() for product in scheme.products]
    refused = [(product, why) for product in products if (why := product.why_not(capability))]
    return [Finding("cuda", f"{product.name} layers", "none", None, f"{why}; {product.instead}") for product, why in refused]


def _compiler() -> list[Finding]:
    try:
        require_compiler()
    except UsageError as error:
        return [Finding("inductor", "C++ compiler", "none", False, f"the backend inductor cannot run: {error.hint}")]
    from torch._inductor.cpp_builder import get_cpp_compiler

    return [Finding("inductor", "C++ compiler", get_cpp_compiler(), True)]


def _space(folder: Path) -> list[Finding]:
    found = []
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, place in (("here", folder), ("hugging face cache", cache)):
        existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        found.append(Finding("disk", name, f"{free / 1e9:.1f} GB free ({place.absolute()})", free > 1e9))
    return found


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"
