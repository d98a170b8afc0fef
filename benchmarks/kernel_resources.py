"""What the Triton kernels need on a chip that need not be there: python -m benchmarks.kernel_resources.

Compiles every shipped configuration for sm_80 and sm_90 and writes registers, spills, shared memory and instructions to
benchmarks/results/kernel-resources.json and .md. No number here was measured on a GPU.
"""

import sys

import torch
import triton

from benchmarks.output import RESULTS, write
from benchmarks.triton_build import SHARED_LIMIT, builds, compile_for

CHIPS = (80, 90)
# Registers and threads of one multiprocessor, and the granularity in which a warp gets registers (CUDA programming guide).
REGISTERS, GRANULE = 65536, 256
WARPS = 64


def collect() -> dict:
    rows = []
    for chip in CHIPS:
        for build in builds(chip):
            made = compile_for(build, chip)
            rows.append(
                {
                    "chip": f"sm_{chip}",
                    "kernel": build.name,
                    "warps": build.warps,
                    "registers": made.registers,
                    "spilled_bytes": made.spilled,
                    "shared_bytes": made.shared,
                    "resident_warps": resident_warps(build.warps, made.registers, made.shared, chip),
                    "tensor_core_instructions": made.instructions if build.instruction else None,
                    "wide_loads": made.wide,
                }
            )
    return {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}


def resident_warps(warps: int, registers: int, shared: int, chip: int) -> int:
    """How many warps of a multiprocessor's 64 its registers and shared memory leave room for."""
    per_warp = -(-registers * 32 // GRANULE) * GRANULE
    blocks = min(REGISTERS // (per_warp * warps), WARPS // warps)
    # A block also takes 1 KB for the system, of a multiprocessor's shared memory: 1 KB more than one block can have.
    by_shared = (SHARED_LIMIT[chip] + 1024) // (shared + 1024)
    return warps * min(blocks, by_shared)


def markdown(result: dict) -> str:
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled with Triton {result['triton']} on a machine without a GPU; nothing here was run on one. Spilled: bytes a "
        "thread keeps in local memory. Resident warps: how many of a multiprocessor's 64 registers and shared memory leave "
        "room for. Tensor-core instructions and 128-bit loads (of the weight, or of what a kernel without one reads; for "
        "kernels with tma the copies by the TMA) are counted in PTX.",
    ]
    for chip in CHIPS:
        lines += ["", f"## sm_{chip}, {SHARED_LIMIT[chip] // 1024} KB of shared memory for a block", ""]
        lines += ["| kernel | warps | registers | spilled | shared KB | resident warps | tensor-core | 128-bit loads |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in result["rows"]:
            if row["chip"] == f"sm_{chip}":
                count = "-" if row["tensor_core_instructions"] is None else row["tensor_core_instructions"]
                lines.append(
                    f"| {row['kernel']} | {row['warps']} | {row['registers']} | {row['spilled_bytes']} | "
                    f"{row['shared_bytes'] / 1024:.1f} | {row['resident_warps']} | {count} | {row['wide_loads']} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    result = collect()
    write(RESULTS / "kernel-resources.json", result, md=markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
