"""mma.sp in NumPy, register by register, for Triton's interpreter, which runs no inline PTX.

After the PTX ISA, sections "Sparse matrix storage" and "Matrix fragments for multiply-accumulate operation with sparse matrix
A" (9.7.14.6 in the text this was made from): "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "... for
sparse mma.m16n8k64 with .u8 / .s8 / .e4m3 / .e5m2 type"; C and D are those of mma.m16n8k16. Metadata is in pictures there,
Figures 122, 136 and 137; tests/kernels/test_sparse24_mma.py holds it against CUTLASS too. g = lane // 4, t = lane % 4:

              A: ai is in row                          and columns (in each four two of ai)        B: bi is in row
    m16n8k32  g for i in 0 1 4 5, else g + 8           4 t .. + 3, from i = 4 on 16 more           2 t + i % 2 + 8 (i // 2)
    m16n8k64  g for i in 0..3 and 8..11, else g + 8    8 t .. + 7, from i = 8 on 32 more           4 t + i % 4 + 16 (i // 4)
              B: in column g; C, D: ci is in row g for i < 2, else g + 8, and in column 2 t + i % 2

              metadata of row r, groups of four 0 .. K / 4 - 1: four bits each, the lower two for the first number
    m16n8k32  lane 4 (r % 8) + 2 selector + group // 4    bits 16 (r // 8) + 4 (group % 4)
    m16n8k64  lane 4 (r % 8) + 2 (group // 8) + r // 8    bits 4 (group % 8)
"""

import re

import numpy as np

MEANINGFUL = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)
"""Of ordered metadata; anything else is undefined behaviour."""
LANES, ROWS, TOKENS = 32, 16, 8
LANE = np.arange(LANES)
G, T = LANE // 4, LANE % 4
TEXT = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.(m16n8k\d+)\.row\.col\.(\w+)\.(\w+)\.(\w+)\.(\w+) "
    r"\{([^}]*)\}, \{([^}]*)\}, \{([^}]*)\}, \{([^}]*)\}, \$(\d+), (\d);"
)
TYPES = {
    ("f32", "bf16", "bf16", "f32"): "m16n8k32",
    ("f32", "f16", "f16", "f32"): "m16n8k32",
    ("s32", "s8", "s8", "s32"): "m16n8k64",
}


class Undefined(Exception):
    """The manual does not say what the instruction does."""


def run(text: str, constraints: str, values: list) -> list:
    """The instruction on whole blocks: [32 * warps] numbers of each operand that is read, in Triton's order -> D's four."""
    found = TEXT.fullmatch(text)
    if not found:
        raise Undefined(f"no such instruction: {text}")
    shape, *types = found.groups()[:5]
    if TYPES.get(tuple(types)) != shape:
        raise Undefined(f"{shape} has no types {types}")
    d, a, b, c = ([int(each.strip().removeprefix("$")) for each in group.split(",")] for group in found.groups()[5:9])
    float_sums = types[0] == "f32"
    classes = constraints.split(",")
    assert d == [0, 1, 2, 3] and all(classes[i] == ("=f" if float_sums else "=r") for i in d), constraints
    assert all(classes[i] == "r" for i in (*a, *b, int(found[10]))), constraints
    assert all(classes[i] == ("f" if float_sums else "r") for i in c), constraints
    warps = [np.ascontiguousarray(value).reshape(-1, LANES) for value in values]
    at = {number: warps[number - len(d)] for number in (*a, *b, *c, int(found[10]))}
    registers_a, registers_b = (np.stack([at[i].view(np.uint32) for i in each], axis=-1) for each in (a, b))
    metadata = at[int(found[10])].view(np.uint32)
    accumulators = np.stack([at[i] for i in c], axis=-1)
    made = multiply(shape, types[1], registers_a, registers_b, accumulators, metadata, int(found[11]))
    return [np.ascontiguousarray(made[..., i]).reshape(-1) for i in range(4)]


def multiply(shape, dtype, a, b, c, metadata, selector):
    """a, b uint32 [warps, 32, 4], c float32 or int32 [warps, 32, 4], metadata uint32 [warps, 32] -> D like c."""
    wide = shape == "m16n8k64"
    if selector not in ((0,) if wide else (0, 1)):
        raise Undefined(f"{shape} has no selector {selector}")
    columns = 64 if wide else 32
    warps = np.arange(len(a))[:, None]
    numbers_a, numbers_b = numbers(a, dtype), numbers(b, dtype)
    dense_a = np.zeros((len(a), ROWS, columns), numbers_a.dtype)
    dense_b = np.zeros((len(a), columns, TOKENS), numbers_b.dtype)
    for i in range(numbers_a.shape[-1]):
        half = i // (4 if wide else 2) % 2
        row = G + 8 * half
        group = 2 * T + i % 4 // 2 + 8 * (i // 8) if wide else T + 4 * (i // 4)
        column = 4 * group + places(shape, metadata, selector, row, group)[i % 2]
        dense_a[warps, row, column] = numbers_a[..., i]
        k = 4 * T + i % 4 + 16 * (i // 4) if wide else 2 * T + i % 2 + 8 * (i // 2)
        dense_b[warps, k, G] = numbers_b[..., i]
    product = np.matmul(dense_a, dense_b)
    made = c.copy()
    for i in range(4):
        made[..., i] += product[warps, G + 8 * (i // 2), 2 * T + i % 2]
    return made


def places(shape, metadata, selector, row, group):
    """Where in its four the first and the second number of each (row, group) is, both [warps, 32]."""
    if shape == "m16n8k64":
        lane, shift = 4 * (row % 8) + 2 * (group // 8) + row // 8, 4 * (group % 8)
    else:
        lane, shift = 4 * (row % 8) + 2 * selector + group // 4, 16 * (row // 8) + 4 * (group % 4)
    code = metadata[:, lane] >> shift.astype(np.uint32) & 15
    if not np.isin(code, MEANINGFUL).all():
        raise Undefined(f"metadata {np.setdiff1d(code, MEANINGFUL)}")
    return code & 3, code >> 2


def numbers(registers, dtype):
    """uint32 [..., 4] -> the numbers that they hold, lowest bits first: float32 [..., 8] or int32 [..., 16]."""
    if dtype == "s8":
        return registers.view(np.int8).astype(np.int32)
    if dtype == "f16":
        return registers.view(np.float16).astype(np.float32)
    return (registers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Make Triton's interpreter run mma.sp."""
    from triton.runtime import interpreter

    class Results(list):
        get_result = list.__getitem__

    def create_inline_asm(self, text, constraints, values, types, pure, pack):
        assert pack == 1
        for value in values:
            assert value.data.ndim == 1 and value.data.size % LANES == 0, "one number a thread"
        made = run(text, constraints, [value.data for value in values])
        dtypes = [kind.scalar if hasattr(kind, "scalar") else kind for kind in types]
        return Results(interpreter.TensorHandle(data, dtype) for data, dtype in zip(made, dtypes))

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
