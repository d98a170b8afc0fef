"""The product of rows and weights that are both 8 bits wide, for many rows on sm_90: persistent programs and the TMA.

The reference is `fxc_kernels.cuda.scaled_mm.scaled_mm_reference`, and `scaled_mm` there calls this where a configuration says
tma. As many programs as the chip runs at once walk over all tiles; the loop over tiles and the loop over K are one to the
compiler (flatten), so that the next tile's loads are under way while a tile is stored. The TMA copies tiles into shared memory
without addresses in registers, and zeros for what is past the end, so there are no masks in the loop. Its descriptors are made
by the host at each launch and passed by value: a CUDA graph keeps them, and no allocator has to be set.

Triton 3.6 and 3.7 wait for an int8 product before they start the next one, while they let float8 products overlap. Two resident
blocks of 128 x 128 with three stages hide that for one another, which is why such a configuration is here. Warp specialization
is not used: with four warps neither version compiles it, and with eight it changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxc_kernels.cuda.tile import Build, Config, dot_instruction, epilogue_types, finish_in_halves, swizzled_tile

CAPABILITY = 90
GROUP = 8
# From the literature and compiled without spills; not yet measured by this project.
CONFIGS = (
    Config(None, 128, 256, 128, 8, 4, tma=True),
    Config(None, 128, 256, 128, 8, 3, tma=True),
    Config(None, 128, 128, 128, 8, 4, tma=True),
    Config(None, 128, 128, 128, 8, 3, tma=True),
)
# Shared memory of a multiprocessor, and what a block takes of it besides its tiles: a tile on its way out, and the system's.
SHARED, BESIDES = 228 * 1024, 18 * 1024


@triton.jit
def persistent_mm_kernel(
    q, w, out, row_scale, zero, scale, column_sum, bias, M, N, K,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """q, w: descriptors of [M, K] in blocks [BLOCK_M, BLOCK_K] and [N, K] in blocks [BLOCK_N, BLOCK_K]."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = swizzled_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(steps):
            a = q.load([tile_m * BLOCK_M, k * BLOCK_K])
            b = w.load([tile_n * BLOCK_N, k * BLOCK_K])
            acc = tl.dot(a, b.T, acc, out_dtype=ACC)
        rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        finish_in_halves(acc, rm, tile_n * BLOCK_N, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)


def fits(q: Tensor, qweight: Tensor, out: Tensor) -> bool:
    """Whether the TMA can read both, rows of whole 16 bytes from an address of whole 16 bytes on, and whether out's numbers
    have at most 16 bits: tiles of float32 on their way out leave too little shared memory."""
    aligned = q.shape[1] % 16 == 0 and q.data_ptr() % 16 == 0 and qweight.data_ptr() % 16 == 0
    return aligned and out.dtype.itemsize <= 2


def programs(device: torch.device, config: Config, tiles: int) -> int:
    """How many programs to start: what a chip runs at once, and no more than there are tiles."""
    resident = max(SHARED // (config.stages * (config.m + config.n) * config.k + BESIDES), 1)
    # The interpreter has two, so that each walks over several tiles.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(processors * resident, tiles)


def persistent_mm(q: Tensor, qweight: Tensor, out: Tensor, epilogue: tuple, activation: str, config: Config) -> None:
    """Fill out [M, N] (or [M, N / 2] after silu_mul). epilogue: row_scale, zero, scale, column_sum, bias of `scaled_mm`, which
    has checked everything; `fits` has to hold."""
    (rows, columns), outputs = q.shape, qweight.shape[0]
    tiles = triton.cdiv(rows, config.m) * triton.cdiv(outputs, config.n)
    persistent_mm_kernel[(programs(q.device, config, tiles),)](
        TensorDescriptor.from_tensor(q, [config.m, config.k]), TensorDescriptor.from_tensor(qweight, [config.n, config.k]),
        out, *epilogue, rows, outputs, columns,
        ACC=tl.int32 if q.dtype == torch.int8 else tl.float32, ACTIVATION=activation,
        BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k, GROUP_M=GROUP,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def builds(capability: int) -> list[Build]:
    if capability < CAPABILITY:
        return []
    made = []
    for kind, dtype in (("int8", "i8"), ("fp8", "fp8e4nv")):
        for config in CONFIGS:
            arguments = {
                "q": f"tensordesc<{dtype}[{config.m}, {config.k}]>", "w": f"tensordesc<{dtype}[{config.n}, {config.k}]>",
                "out": "*bf16", **epilogue_types(kind), "M": "i32", "N": "i32", "K": "i32",
                "ACC": tl.int32 if kind == "int8" else tl.float32, "ACTIVATION": "none",
                "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k, "GROUP_M": GROUP,
            }  # fmt: skip
            types = "s8.s8" if kind == "int8" else "e4m3.e4m3"
            name = f"{kind} persistent gemm {config}"
            instruction = dot_instruction(CAPABILITY, types)
            made.append(Build(name, persistent_mm_kernel, arguments, config.warps, config.stages, instruction, wide="tma"))
    return made
