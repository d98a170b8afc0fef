"""Products with 2:4 sparse weights on sparse tensor cores: mma.sp on weights that are stored in the order its registers want.

out^T = W x^T: 16 rows of the weight are the sparse operand A, 8 rows (tokens) of x the columns of B. Triton has no sparse
product, so the instruction is written out, for tensors of one number a thread: number i belongs to lane i % 32 of warp i // 32.
`fxc_kernels.cuda.sparse24_prepacked` has the order of the weight, tests/helpers/mma_emulation.py the registers, one by
one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxc_kernels.cuda.sparse24_prepacked import COLUMNS, KINDS, ROWS, Prepacked
from fxc_kernels.cuda.split_k import finish_part, part_length, reduce_parts, workspace
from fxc_kernels.cuda.tile import Build, Config, epilogue_types

B_COLUMNS = 8
"""Rows (tokens) of x that one instruction multiplies."""
# Compiled without spills; not yet measured by this project. m: tokens; n: rows of the weight, of which a warp takes 32, or 16
# where there are no more; k: columns that a warp takes at a time. The warps of the same rows take turns along K.
CONFIGS = {
    80: (
        Config(8, 8, 16, 256, 8, 1, split=4, fill=1),
        Config(16, 16, 32, 128, 8, 1, split=4, fill=1),
        Config(32, 32, 32, 128, 8, 1, split=4, fill=1),
        Config(64, 64, 64, 128, 8, 1, split=4, fill=1),
    ),
}
INT8_CONFIGS = {
    80: (
        Config(8, 8, 16, 512, 8, 1, split=4, fill=1),
        Config(16, 16, 32, 256, 8, 1, split=4, fill=1),
        Config(32, 32, 32, 256, 8, 1, split=4, fill=1),
        Config(64, 64, 64, 128, 8, 1, split=4, fill=1),
    ),
}


@triton.jit
def mma_sp(a, b, c, e, SELECTOR: tl.constexpr, KIND: tl.constexpr):
    """c + a b of one warp's tile: a, b four registers, c four numbers, e the metadata. 16 bits: 32 columns of the weight, whose
    metadata is in the lanes with t // 2 == SELECTOR; 8 bits: 64 columns, selector 0."""
    arguments: tl.constexpr = " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, "
    given = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], e]
    # Ordered metadata: places that ascend. ptxas warns that products without that promise may be slow on later chips.
    if KIND == "s8":
        return tl.inline_asm_elementwise(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32" + arguments + "0;",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            given, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        types: tl.constexpr = ".f32." + KIND + "." + KIND + ".f32"
        return tl.inline_asm_elementwise(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col" + types + arguments + ("1;" if SELECTOR == 1 else "0;"),
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
            given, dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def four_words(block, THREADS: tl.constexpr):
    """[THREADS, 4] -> the four columns."""
    even, odd = tl.split(tl.reshape(block, (THREADS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_weight(
    w, meta, row_tile, tile, last, lane, across,
    RUN: tl.constexpr, DOWN: tl.constexpr, STEPS: tl.constexpr, THREADS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """RUN tiles from `tile` on of DOWN rows of tiles: ((metadata, registers of each step), ...). Behind `last` are zeros."""
    words = tl.arange(0, 4)[None, :]
    loaded = ()
    for u in tl.static_range(RUN):
        inside = tile + u <= last
        for r in tl.static_range(DOWN):
            at = row_tile[r] * across + tile + u
            w_at = w + (at * (STEPS * 128) + lane * 4)[:, None] + words
            m_at = meta + at * 32 + lane
            if MASK == 0:
                e = tl.load(m_at, eviction_policy="evict_first")
            else:
                # Places that ascend: others, 0 too, have no meaning.
                e = tl.load(m_at, mask=inside, other=0x44444444, eviction_policy="evict_first")
            registers = ()
            for s in tl.static_range(STEPS):
                if MASK == 0:
                    block = tl.load(w_at + s * 128, eviction_policy="evict_first")
                else:
                    block = tl.load(w_at + s * 128, mask=inside[:, None], other=0, eviction_policy="evict_first")
                registers = registers + (four_words(block, THREADS),)
            loaded = loaded + ((e, registers),)
    return loaded


@triton.jit
def load_tokens(x_at, word, x_row, MASK: tl.constexpr, KIND: tl.constexpr, THREADS: tl.constexpr):
    """The registers of 8 tokens for one instruction, `word` the first of its columns in words of 4 bytes. Where the weight has
    only zeros it does not matter what is read, as long as it is x."""
    quarter = tl.arange(0, THREADS) % 4
    if KIND == "s8":
        at = (word + 4 * quarter)[:, None] + tl.arange(0, 4)[None, :]
        if MASK == 2:
            at = tl.minimum(at, x_row - 1)
        return four_words(tl.load(x_at[:, None] + at), THREADS)
    else:
        registers = ()
        for i in tl.static_range(4):
            at = word + 4 * i + quarter
            if MASK == 2:
                at = tl.minimum(at, x_row - 1)
            registers = registers + (tl.load(x_at + at),)
        return registers


@triton.jit
def sparse24_mma_kernel(
    x, w, meta, out, parts, row_scale, zero, scale, column_sum, bias, M, N, x_row, across, part_tiles,
    KIND: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """x int32 [M, x_row], w int32 and meta int32 as `Prepacked` has them, `across` tiles in a row of tiles. MASK: 0 where no
    warp ever lacks a tile, 1 where one may, 2 where the last tile also ends behind x."""
    THREADS: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = 1 if KIND == "s8" else 2
    TILE_WORDS: tl.constexpr = 16 if KIND == "s8" else 32
    DOWN: tl.constexpr = 2 if BLOCK_N >= 32 else 1
    ALONG: tl.constexpr = WARPS * DOWN * 16 // BLOCK_N
    TOKENS: tl.constexpr = BLOCK_M // 8
    # More tokens than that have no room in registers for a whole turn.
    AHEAD: tl.constexpr = TOKENS <= 2
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    turn = thread // 32 % ALONG * RUN
    part = tl.program_id(2)
    start = part * part_tiles
    stop = tl.minimum(start + part_tiles, across)
    rows = tl.program_id(0) * (BLOCK_N // 16) + thread // (32 * ALONG) * DOWN
    row_tile = ()
    for r in tl.static_range(DOWN):
        row_tile = row_tile + (tl.minimum(rows + r, tl.cdiv(N, 16) - 1).to(tl.int64),)
    x_at = ()
    for m in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(1) * BLOCK_M + m * 8 + lane // 4, M - 1)
        x_at = x_at + (x + token.to(tl.int64) * x_row,)
    zeros = tl.zeros((THREADS,), tl.int32 if KIND == "s8" else tl.float32)
    # 0, which the compiler cannot know. ptxas saves registers: it puts each load right before its use, where nothing else is in
    # flight. When every product also takes 0 & something of every load, all loads of a turn are in flight at once.
    nothing = across >> 31
    acc = ()
    for _ in tl.static_range(TOKENS * DOWN):
        acc = acc + ((zeros, zeros, zeros, zeros),)
    for first in range(start, stop, RUN * ALONG):
        tile = first + turn
        present = load_weight(w, meta, row_tile, tile, stop - 1, lane, across, RUN, DOWN, STEPS, THREADS, MASK)
        seen = lane
        for i in tl.static_range(RUN * DOWN):
            e, a = present[i]
            seen = seen ^ e
            for s in tl.static_range(STEPS):
                seen = seen ^ a[s][0]
        tokens = ()
        if AHEAD:
            for i in tl.static_range(RUN * STEPS):
                word = tl.minimum(tile + i // STEPS, stop - 1) * TILE_WORDS + i % STEPS * 16
                for m in tl.static_range(TOKENS):
                    b = load_tokens(x_at[m], word, x_row, MASK, KIND, THREADS)
                    for number in tl.static_range(1 if KIND == "s8" else 4):
                        seen = seen ^ b[number]
                    tokens = tokens + (b,)
        seen = seen & nothing
        for i in tl.static_range(RUN * STEPS):
            made = ()
            for m in tl.static_range(TOKENS):
                if AHEAD:
                    b = tokens[i * TOKENS + m]
                else:
                    word = tl.minimum(tile + i // STEPS, stop - 1) * TILE_WORDS + i % STEPS * 16
                    b = load_tokens(x_at[m], word, x_row, MASK, KIND, THREADS)
                for r in tl.static_range(DOWN):
                    e, a = present[i // STEPS * DOWN + r]
                    made = made + (mma_sp(a[i % STEPS], b, acc[m * DOWN + r], e | seen, i % STEPS, KIND),)
            acc = made
    # All accumulators as one tensor, whose sum over the warps along K is one trip through shared memory.
    tiles = ()
    for i in tl.static_range(TOKENS * DOWN):
        tiles = tiles + (tl.join(tl.join(acc[i][0], acc[i][1]), tl.join(acc[i][2], acc[i][3])),)
    for halving in tl.static_range(1, 6):
        if 1 << halving <= TOKENS * DOWN:
            joined = ()
            for i in tl.static_range((TOKENS * DOWN) >> halving):
                joined = joined + (tl.join(tiles[i], tiles[i + ((TOKENS * DOWN) >> halving)]),)
            tiles = joined
    # Of an accumulator's four numbers, two are neighbouring tokens of row g, two of row g + 8: 2 t and 2 t + 1.
    whole = tl.reshape(tiles[0], (WARPS // ALONG, ALONG, 8, 4, 2, 2, TOKENS, DOWN))
    summed = tl.sum(whole, axis=1)
    result = tl.reshape(tl.permute(summed, (5, 2, 3, 0, 6, 4, 1)), (BLOCK_M, BLOCK_N))
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    finish_part(result, rm, rn, part, M, N, out, parts, row_scale, zero, scale, column_sum, bias, ACTIVATION)


def check_config(config: Config) -> None:
    """Raises ValueError for a configuration that the kernel cannot have."""
    powers = all(size & (size - 1) == 0 for size in (config.m, config.n, config.k // COLUMNS))
    if not powers or config.m < B_COLUMNS or config.n < ROWS or config.k % COLUMNS or not config.k:
        raise ValueError(f"configuration {config}: m, n and k must be 8, 16 and 64 times powers of two")
    if along_k(config) < 1:
        raise ValueError(f"configuration {config}: {config.n} rows need {config.n // (2 * ROWS)} warps or more")


def along_k(config: Config) -> int:
    """How many warps share the same rows of the weight."""
    return config.warps * min(config.n, 2 * ROWS) // config.n


def multiply(x: Tensor, weight: Prepacked, out: Tensor, epilogue: tuple, activation: str, config: Config) -> None:
    """out [M, N] from rows x [M, K] of the values' dtype; epilogue: row_scale, zero, scale, column_sum, bias, for `finish`."""
    check_config(config)
    if x.data_ptr() % 16:
        x = x.clone()
    rows, across = x.shape[0], weight.values.shape[1]
    words = x.view(torch.int32)
    turn = config.k // COLUMNS * along_k(config)
    part_tiles, split = part_length(across, turn, config.split)
    mask = 2 if weight.columns % COLUMNS else int(across % turn != 0)
    parts = workspace(split, out, weight.outputs, integers=x.dtype == torch.int8)
    grid = (triton.cdiv(weight.outputs, config.n), triton.cdiv(rows, config.m), split)
    sparse24_mma_kernel[grid](
        words, weight.values.view(torch.int32), weight.meta, out, parts, *epilogue,
        rows, weight.outputs, words.shape[1], across, part_tiles,
        KIND=KINDS[x.dtype], MASK=mask, ACTIVATION=activation, BLOCK_M=config.m, BLOCK_N=config.n,
        RUN=config.k // COLUMNS, WARPS=config.warps, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    reduce_parts(parts, out, *epilogue, activation)


def builds(capability: int) -> list[Build]:
    made = []
    for kind, configs in (("bf16", CONFIGS), ("f16", CONFIGS), ("s8", INT8_CONFIGS)):
        for config in configs[80]:
            # `choose` cuts K only where the weight has few rows.
            for parts in (None, "*i32" if kind == "s8" else "*fp32"):
                made.append(_build(kind, config, parts))
    return made


def _build(kind: str, config: Config, parts: str | None) -> Build:
    arguments = {
        "x": "*i32", "w": "*i32", "meta": "*i32", "out": "*fp16" if kind == "f16" else "*bf16", "parts": parts,
        **epilogue_types("int8" if kind == "s8" else "float"),
        "M": "i32", "N": "i32", "x_row": "i32", "across": "i32", "part_tiles": "i32",
        "KIND": kind, "MASK": 1, "ACTIVATION": "none", "BLOCK_M": config.m, "BLOCK_N": config.n,
        "RUN": config.k // COLUMNS, "WARPS": config.warps,
    }  # fmt: skip
    types = r"m16n8k64\.row\.col\.s32\.s8\.s8" if kind == "s8" else rf"m16n8k32\.row\.col\.f32\.{kind}\.{kind}"
    instruction = rf"mma\.sp::ordered_metadata\.sync\.aligned\.{types}"
    name = f"2:4 {'int8' if kind == 's8' else kind} mma.sp {replace(config, split=1)}{'' if parts is None else ' in parts'}"
    return Build(name, sparse24_mma_kernel, arguments, config.warps, config.stages, instruction, wide="w_at")
