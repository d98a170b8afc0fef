"""What the Triton kernels share: a shipped configuration, the order of tiles, activations and the epilogue.

The kernels of this folder run on CUDA, or on CPU tensors when TRITON_INTERPRET=1 was set before triton's first import.
Products of few rows (tokens) compute out^T = W x^T: the weight is the operand with 64 or more rows that tensor cores
want, and on sm_90 the only operand that they take from registers, where int8 and int4 are turned into floats.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

# silu_mul is for weights whose rows alternate, gate and up (fxc_kernels.cuda.interleaved): of N columns it leaves N / 2.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "silu_mul")
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even. libdevice's rint does the
# same, but not in the interpreter.
ROUND = tl.constexpr(12582912.0)
# The interpreter multiplies bfloat16 numbers as the integers that it keeps them in, so there they become float32 first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """One shipped configuration. rows: the largest number of rows (tokens) it is meant for, None for any; m, n, k: the tile;
    split: into how many parts K is cut; tma: the persistent kernel of `persistent_mm`; fill: how many programs for
    each multiprocessor are enough, beyond which `choose` does not cut K."""

    rows: int | None
    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    tma: bool = False
    fill: int = 2

    def __str__(self) -> str:
        split = f" split {self.split}" if self.split > 1 else ""
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{split}{' tma' if self.tma else ''}"

    @staticmethod
    def parse(text: str) -> Config:
        """What str() of a configuration wrote, for any number of rows. Raises ValueError."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+)(?: split (\d+))?( tma)?", text)
        if not found:
            raise ValueError(f"{text!r} is no configuration: write MxNxK, warps and stages as in 16x64x256 w4 s5 split 4")
        *sizes, split, tma = found.groups()
        config = Config(None, *(int(size) for size in sizes), split=int(split or 1), tma=bool(tma))
        tile = (config.m, config.n, config.k, config.warps)
        if any(size < 1 or size & (size - 1) for size in tile) or config.stages < 1 or config.split < 1:
            raise ValueError(f"{text!r} is no configuration: tile and warps are powers of two, and nothing is 0")
        return config


@dataclass(frozen=True)
class Build:
    """One kernel with everything that its compilation depends on.

    arguments: of each parameter a Triton type ("*bf16", "i32") or, for a constexpr, its value. instruction: what its PTX has
    to hold, as a regular expression, or "" for kernels that use no tensor cores. wide: what the source calls the address, as a
    rule of the weights, that has to be loaded 128 bits at a time, or "tma" for what the TMA has to load.
    unaligned: which pointers and sizes are not multiples of 16.
    """

    name: str
    kernel: object
    arguments: dict[str, object]
    warps: int
    stages: int
    instruction: str = ""
    wide: str = "w"
    fp_fusion: bool = True
    unaligned: tuple[str, ...] = ()


def epilogue_types(kind: str) -> dict[str, str | None]:
    """Of `finish`'s arguments, for a `Build`: those of int8 sums, of float8 ones, and "float", which have a bias alone."""
    found = {"row_scale": "*fp32", "zero": "*i32", "scale": "*fp32", "column_sum": "*i32", "bias": "*bf16"}
    absent = {"int8": (), "fp8": ("zero", "column_sum"), "float": ("row_scale", "zero", "scale", "column_sum")}[kind]
    return found | dict.fromkeys(absent)


def dot_instruction(capability: int, types: str) -> str:
    """The tensor-core instruction of a product of such types ("s8.s8") for its operands, as a regular expression."""
    name = "wgmma.mma_async" if capability == 90 else "mma.sync"
    return rf"{re.escape(name)}\.[\w.]*{re.escape(types)}"


def insert_before(arguments: dict[str, object], place: str, name: str, value: object) -> dict[str, object]:
    """`arguments` with one more before `place`: their order is the kernel's."""
    made = {}
    for each, present in arguments.items():
        if each == place:
            made[name] = value
        made[each] = present
    return made


def choose(
    configs: dict[int, tuple[Config, ...]], capability: int, rows: int, outputs: int = 1, processors: int = 108
) -> Config:  # fmt: skip
    """The first configuration for `rows` in the table of the newest generation that is not newer than the chip, with K cut
    into no more parts than give its `processors` enough programs for a weight of `outputs` rows."""
    # sm_120 has as little shared memory as sm_89.
    capability = min(capability, 89) if capability >= 120 else capability
    generation = max((each for each in configs if each <= capability), default=min(configs))
    config = next(each for each in configs[generation] if each.rows is None or rows <= each.rows)
    tiles = -(-outputs // config.n) * -(-rows // config.m)
    return replace(config, split=min(config.split, -(-config.fill * processors // tiles)))


def capability_of(x: Tensor) -> int:
    """90 for an H100 or H200; 80 for the interpreter's CPU tensors."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def processors_of(x: Tensor) -> int:
    """How many multiprocessors x's device has; an A100's 108 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 108


def on_device_of_first(function):
    """`function` with the device of its first argument, a tensor, as the current one: Triton starts kernels there."""

    @functools.wraps(function)
    def run(x, /, *arguments, **options):
        with torch.cuda.device_of(x):
            return function(x, *arguments, **options)

    return run


def check_vectors(length: int, **vectors: Tensor | None) -> None:
    """Raises ValueError where one of them, if it is there, is not `length` numbers one after the other, as kernels read it."""
    for name, vector in vectors.items():
        if vector is not None and (vector.numel() != length or not vector.is_contiguous()):
            layout = "" if vector.is_contiguous() else ", not contiguous"
            raise ValueError(f"{name} must be {length} contiguous numbers, not {tuple(vector.shape)}{layout}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")


def output_columns(outputs: int, activation: str) -> int:
    """How many columns a product of `outputs` columns has after `activation`. Raises ValueError for an unknown activation and
    for an odd number of columns that should be pairs."""
    check_activation(activation)
    if activation != "silu_mul":
        return outputs
    if outputs % 2:
        raise ValueError(f"silu_mul takes pairs of gate and up, and {outputs} columns are no pairs")
    return outputs // 2


def flat_rows(x: Tensor) -> Tensor:
    """[..., K] as contiguous [M, K], also where nothing is in it."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    return x.reshape(rows, x.shape[-1]).contiguous()


@triton.jit
def swizzled_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile-th (row, column) in an order that walks GROUP rows of tiles together, so that weights stay in the L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@triton.jit
def dot_floats(a, b, acc):
    """acc + a b. float32 operands are multiplied as three TF32 products, which is close to float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def finish(acc, rm, rn, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION: tl.constexpr):
    """Store acc [BLOCK_M, BLOCK_N] at rows rm and columns rn of out [M, N]:
    activate((acc - zero[m] * column_sum[n]) * scale[n] * row_scale[m] + bias[n]); what is None is left out.
    With silu_mul out is [M, N / 2], and rn has to be BLOCK_N consecutive columns from a multiple of BLOCK_N on."""
    in_m = rm < M
    in_n = rn < N
    if zero is not None:
        z = tl.load(zero + rm, mask=in_m, other=0)
        sums = tl.load(column_sum + rn, mask=in_n, other=0)
        acc = acc - z[:, None] * sums[None, :]
    value = acc.to(tl.float32)
    if scale is not None:
        value = value * tl.load(scale + rn, mask=in_n, other=0.0)[None, :]
    if row_scale is not None:
        value = value * tl.load(row_scale + rm, mask=in_m, other=0.0)[:, None]
    if bias is not None:
        value = value + tl.load(bias + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu_mul":
        BLOCK_M: tl.constexpr = acc.shape[0]
        PAIRS: tl.constexpr = acc.shape[1] // 2
        gate, up = tl.split(tl.reshape(value, (BLOCK_M, PAIRS, 2)))
        value = activate(gate, "silu") * up
        even, _ = tl.split(tl.reshape(rn, (PAIRS, 2)))
        # The compiler cannot see through the split, and would store one number at a time.
        pairs = tl.max_contiguous(tl.multiple_of(even // 2, PAIRS), PAIRS)
        where = rm.to(tl.int64)[:, None] * (N // 2) + pairs[None, :]
        tl.store(out + where, value.to(out.dtype.element_ty), mask=in_m[:, None] & (pairs < N // 2)[None, :])
    else:
        value = activate(value, ACTIVATION)
        where = rm.to(tl.int64)[:, None] * N + rn[None, :]
        tl.store(out + where, value.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def finish_in_halves(acc, rm, first, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION: tl.constexpr):
    """`finish` for the columns from `first` on, half of them after the other half: that needs half as many registers, and
    half the shared memory on the way out."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    rn = first + tl.arange(0, HALF)
    finish(left, rm, rn, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)
    finish(right, rm, rn + HALF, M, N, out, row_scale, zero, scale, column_sum, bias, ACTIVATION)
