"""Compile a kernel for a chip that is not there, and say what came out: what can be known of a kernel without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxc_kernels.cuda import (
    int4_linear,
    norm_quantize,
    persistent_mm,
    quantize_rows,
    rms_norm,
    rope,
    scaled_mm,
    sparse24,
    sparse24_mma,
    sparse24_prepacked_linear,
    weight_only,
)
from fxc_kernels.cuda.tile import Build

# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
WIDE = (
    r"ld\.global[\w.:]*\.v4\.(?:b32|u32|f32)|ld\.global[\w.:]*\.v2\.(?:b64|u64)"
    r"|cp\.async\.cg\.shared\.global [^;]*, 0x10|cp\.async\.cg\.shared\.global [^;]*, 16"
)
TMA = r"cp\.async\.bulk\.tensor\.[\w.]*shared::\w+\.global\."
# Each has `builds(capability)`: everything that it ships.
MODULES = (
    quantize_rows,
    norm_quantize,
    rms_norm,
    rope,
    scaled_mm,
    persistent_mm,
    weight_only,
    int4_linear,
    sparse24,
    sparse24_mma,
    sparse24_prepacked_linear,
)


@dataclass(frozen=True)
class Resources:
    """registers: a thread's; spilled: bytes a thread keeps in local memory; shared: bytes a block needs;
    instructions: how often the PTX holds the expected tensor-core instruction;
    wide: how many 128-bit loads of the weight it has (of `Build.wide`), or how many copies by the TMA."""

    registers: int
    spilled: int
    shared: int
    instructions: int
    wide: int


def builds(capability: int) -> list[Build]:
    """Every kernel in every configuration shipped for compute capability `capability`."""
    return [build for module in MODULES for build in module.builds(capability)]


def compile_for(build: Build, capability: int) -> Resources:
    """`build` compiled for compute capability `capability` (80, 90)."""
    made = compiled(build, capability)
    ptx = made.asm["ptx"]
    registers, spilled = _usage(made.asm["cubin"])
    instructions = len(re.findall(build.instruction, ptx)) if build.instruction else 0
    return Resources(registers, spilled, made.metadata.shared, instructions, _wide_loads(ptx, build.wide))


def _wide_loads(ptx: str, address: str) -> int:
    """How many 128-bit loads come from a source line that says tl.load(address...: PTX says of each instruction which.
    Of "tma", how many copies the TMA makes."""
    if address == "tma":
        return len(re.findall(TMA, ptx))
    files = re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.MULTILINE)
    sources = {number: Path(path).read_text().splitlines() for number, path in files}
    count, line = 0, ""
    for text in ptx.splitlines():
        place = re.match(r"\s*\.loc\s+(\d+) (\d+)", text)
        if place and place[2] != "0":
            line = sources[place[1]][int(place[2]) - 1]
        elif re.search(WIDE, text):
            count += f"tl.load({address}" in line
    return count


def compiled(build: Build, capability: int):
    """What Triton makes of it: asm["ptx"], asm["cubin"], metadata."""
    assert list(build.arguments) == build.kernel.arg_names, f"{build.name}: {build.kernel.arg_names}"
    typed = {name for name, value in build.arguments.items() if isinstance(value, str) and _is_type(value)}
    signature = {name: value if name in typed else "constexpr" for name, value in build.arguments.items()}
    constants = {name: value for name, value in build.arguments.items() if name not in typed}
    hinted = {name for name in typed if name not in build.unaligned and not signature[name].startswith("tensordesc")}
    attributes = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(build.arguments) if name in hinted}
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": build.fp_fusion}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _is_type(text: str) -> bool:
    return text.startswith(("*", "tensordesc<")) or text in ("i32", "i64", "fp32")


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) as cuobjdump, which comes with Triton, reads them from a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([command, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local
