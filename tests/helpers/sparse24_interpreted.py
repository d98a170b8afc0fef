"""The kernels for prepacked 2:4 weights against their references, mma.sp emulated: python sparse24_interpreted.py NAME...,
with `every` as in triton_interpreted.py.

A script for the reason that triton_interpreted.py is one, whose tolerances hold here too. The kernel that runs is the
shipped one, with its addresses, masks, loop and epilogue; only the instruction is mma_emulation.py's.
"""

import itertools
import os
import re
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import mma_emulation
import numpy as np
import torch
from triton_interpreted import cases, close, scales, tensors

from fxc_kernels import sparse24_linear
from fxc_kernels.cuda import sparse24_prepacked as prepacked
from fxc_kernels.cuda import sparse24_prepacked_linear as sparse
from fxc_kernels.cuda.interleaved import silu_mul
from fxc_kernels.cuda.quantize_rows import quantize_rows
from fxc_kernels.cuda.tile import Config

PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
FLOATS = (torch.bfloat16, torch.float16)
# (rows, outputs, columns): one of everything, tails of tiles in every dimension, whole tiles.
SHAPES = ((1, 1, 8), (3, 17, 200), (8, 32, 128), (9, 33, 264), (20, 40, 136), (64, 16, 72))
# Two warps in turns along K; four warps on two times 32 rows; K in parts; all tokens in one block.
CONFIGS = (
    Config(None, 8, 16, 64, 2, 1), Config(None, 8, 64, 128, 4, 1), Config(None, 16, 32, 64, 2, 1, split=2),
    Config(None, 64, 16, 64, 1, 1),
)  # fmt: skip
# Each shape with what it would get and with one that fits badly, because the interpreter is slow.
CASES = tuple((shape, (None, CONFIGS[number % 4])) for number, shape in enumerate(SHAPES))


def portable(outputs, columns, dtype, generator):
    """Random values and places: [N, K/2] and [N, K/8]."""
    chosen = torch.randint(0, 6, (outputs, columns // 4), generator=generator)
    meta = (PAIRS[chosen].reshape(outputs, -1, 4) * torch.tensor([1, 4, 16, 64])).sum(-1).to(torch.uint8)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (outputs, columns // 2), generator=generator, dtype=torch.int8), meta
    return torch.randn(outputs, columns // 2, generator=generator).to(dtype), meta


def check_float():
    for (shape, configs), dtype in cases(CASES, FLOATS):
        x, bias, generator = tensors(shape, dtype)
        values, meta = portable(*shape[1:], dtype, generator)
        weight = prepacked.prepack(values, meta)
        for config, given in itertools.product(configs, (bias, None) if shape == SHAPES[1] else (bias,)):
            expected = sparse24_linear.sparse24_linear_reference(x, values, meta, given)
            assert close(sparse.prepacked_linear(x, weight, given, config=config), expected), (shape, dtype, config)
    x, bias, _ = tensors((2, 16, 8), torch.bfloat16)
    weight = prepacked.prepack(*portable(16, 8, torch.bfloat16, torch.Generator()))
    assert sparse.prepacked_linear(x[:0].reshape(0, 2, 8), weight, bias).shape == (0, 2, 16)
    odd = torch.zeros(17, dtype=torch.bfloat16)[1:].view(2, 8)
    odd.copy_(x)
    assert torch.equal(sparse.prepacked_linear(odd, weight), sparse.prepacked_linear(x, weight)), "an odd address"


def check_int8():
    for number, (shape, configs) in enumerate(CASES):
        dtype = (torch.float32, *FLOATS)[number % 3]
        x, bias, generator = tensors(shape, dtype)
        values, meta = portable(*shape[1:], torch.int8, generator)
        weight, scale = prepacked.prepack(values, meta), scales(shape[1], generator)
        expected = sparse24_linear.int8_sparse24_linear_reference(x, values, meta, scale, bias)
        for config in configs:
            out = sparse.int8_prepacked_linear(x, weight, scale, bias, config=config)
            assert close(out, expected), (shape, dtype, config)
        wrong = sparse.int8_prepacked_linear(x, weight, scale, bias, column_sum=prepacked.row_sums(weight) * 0)
        assert not close(wrong, expected), "the mutation was not seen"
        q, row_scale, _ = quantize_rows(x)
        sums = q.int() @ sparse24_linear.unpack(values, meta).int().t()
        exact = sparse.prepacked_scaled_mm(
            q, row_scale * 0 + 1, None, weight, scale * 0 + 1, dtype=torch.float32, config=CONFIGS[2]
        )
        assert torch.equal(exact.int(), sums), (shape, "integer sums are exact")


def check_activations():
    functional = torch.nn.functional
    meant = {"gelu": functional.gelu, "silu": functional.silu, "silu_mul": silu_mul}
    x, bias, generator = tensors((5, 34, 40), torch.float32)
    values, meta = portable(34, 40, torch.int8, generator)
    weight, scale = prepacked.prepack(values, meta), scales(34, generator)
    for (name, function), config in itertools.product(meant.items(), (None, CONFIGS[2])):
        expected = function(sparse24_linear.int8_sparse24_linear_reference(x, values, meta, scale, bias))
        out = sparse.int8_prepacked_linear(x, weight, scale, bias, activation=name, config=config)
        assert close(out, expected), (name, config)


def check_many_rows():
    """More than 64: the dense matrix, made from the prepacked form, and products with it."""
    for outputs, columns, dtype in itertools.product((1, 17, 32), (8, 264, 320), (*FLOATS, torch.int8)):
        values, meta = portable(outputs, columns, dtype, torch.Generator().manual_seed(1))
        weight = prepacked.prepack(values, meta)
        assert torch.equal(sparse.dense_from_prepacked(weight), sparse24_linear.unpack(values, meta)), (outputs, columns)
        if dtype == torch.int8:
            assert torch.equal(prepacked.row_sums(weight), values.sum(dim=1, dtype=torch.int32))
    for dtype in (*FLOATS, torch.int8):
        x, bias, generator = tensors((81, 32, 32), torch.bfloat16 if dtype == torch.int8 else dtype)
        values, meta = portable(32, 32, dtype, generator)
        weight, scale = prepacked.prepack(values, meta), scales(32, generator)
        if dtype == torch.int8:
            expected = sparse24_linear.int8_sparse24_linear_reference(x, values, meta, scale, bias)
            out = sparse.int8_prepacked_linear(x, weight, scale, bias)
        else:
            expected = silu_mul(sparse24_linear.sparse24_linear_reference(x, values, meta, bias))
            out = sparse.prepacked_linear(x, weight, bias, activation="silu_mul")
        # Rounded before the activation too.
        assert (out.float() - expected.float()).abs().max() <= 2**-6 * expected.float().abs().max(), dtype


def check_mutations():
    """What the emulation is there to see: each of these has to give wrong numbers, or what the manual does not define."""
    shape = (8, 32, 128)
    for dtype, config in itertools.product((torch.bfloat16, torch.int8), (CONFIGS[0], CONFIGS[2])):
        x, _, generator = tensors(shape, torch.bfloat16)
        values, meta = portable(*shape[1:], dtype, generator)
        weight, scale = prepacked.prepack(values, meta), scales(shape[1], generator)

        def wrong(mutated=weight, dtype=dtype, x=x, values=values, meta=meta, scale=scale, config=config):
            if dtype == torch.int8:
                expected = sparse24_linear.int8_sparse24_linear_reference(x, values, meta, scale, None)
                sums = values.sum(dim=1, dtype=torch.int32)
                out = sparse.int8_prepacked_linear(x, mutated, scale, column_sum=sums, config=config)
            else:
                expected = sparse24_linear.sparse24_linear_reference(x, values, meta, None)
                out = sparse.prepacked_linear(x, mutated, config=config)
            return not close(out, expected)

        def changed(weight=weight, **fields):
            return prepacked.Prepacked(**{**vars(weight), **fields})

        assert not wrong(weight)
        halves = weight.meta.view(torch.int16).reshape(2, 2, 32, 2).flip(-1).contiguous().view(torch.int32).squeeze(-1)
        assert wrong(changed(meta=halves)), "halves of the metadata words swapped"
        lanes = weight.meta.reshape(2, 2, 8, 2, 2).transpose(-1, -2).reshape(2, 2, 32).contiguous()
        assert wrong(changed(meta=lanes)), "metadata in the lanes of the wrong selector"
        registers = weight.values.view(torch.int32).reshape(-1, 4)[:, [0, 2, 1, 3]].contiguous()
        assert wrong(changed(values=registers.view(dtype).reshape(weight.values.shape))), "registers A1 and A2 swapped"
        order, prepacked._column_group = prepacked._column_group, lambda group: group
        assert wrong(prepacked.prepack(values, meta)) == (dtype == torch.int8), "columns of x in another order"
        prepacked._column_group = order
        nothing = weight.meta.clone()
        nothing[0, 0, 3] = 0
        assert undefined(wrong, changed(meta=nothing)), "metadata without a meaning"
        for pattern, text in ((r", 1;", ", 0;"), (r"\{\$4,\$5,\$6", "{$4,$6,$5"), (r"\$8,\$9", "$9,$8")):
            if dtype == torch.int8 and text == ", 0;":
                continue
            with mutated_instruction(pattern, text):
                assert wrong(weight), text
        with mutated_instruction("ordered_metadata", "unordered"):
            assert undefined(wrong)
        with mutated_instruction(r", [01];", ", 2;"):
            assert undefined(wrong), "a selector that does not exist"


class mutated_instruction:
    """The emulation reads a changed instruction."""

    def __init__(self, pattern, text):
        self.pattern, self.text, self.run = pattern, text, mma_emulation.run

    def __enter__(self):
        mma_emulation.run = lambda text, *rest: self.run(re.sub(self.pattern, self.text, text), *rest)

    def __exit__(self, *error):
        mma_emulation.run = self.run


def undefined(call, *arguments) -> bool:
    try:
        call(*arguments)
    except Exception as error:  # the interpreter wraps what a kernel raises
        while error is not None:
            if isinstance(error, mma_emulation.Undefined):
                return True
            error = error.__cause__ or error.__context__
        raise
    return False


def check_emulation():
    """The emulated instruction against D = A B + C, with fragments made from whole matrices as CuTe's layouts of the same
    instructions have them (cute/atom/mma_traits_sm80_sparse.hpp in CUTLASS), an independent source of the same facts."""
    random = np.random.default_rng(0)
    for shape, dtype, columns in (("m16n8k32", "bf16", 32), ("m16n8k32", "f16", 32), ("m16n8k64", "s8", 64)):
        places = np.array(PAIRS.tolist())[random.integers(0, 6, (16, columns // 4))]
        kept = random.integers(-99, 99, (16, columns // 2))
        dense = np.zeros((16, columns // 4, 4), np.int64)
        np.put_along_axis(dense, places, kept.reshape(16, -1, 2), axis=-1)
        b, c = random.integers(-99, 99, (columns, 8)), random.integers(-999, 999, (16, 8))
        layout = CUTE[shape]
        a_row, a_column = by_layout(layout["A"], 16)
        b_column, b_row = by_layout(layout["B"], 8)
        c_row, c_column = by_layout(layout["C"], 16)
        acc = c[c_row, c_column][None].astype(np.int32 if dtype == "s8" else np.float32)
        given = registers(kept[a_row, a_column // 2], dtype), registers(b[b_row, b_column], dtype), acc
        whole = (dense.reshape(16, columns) @ b + c)[c_row, c_column]
        row, column = (each[:, ::4] for each in by_layout(layout["E"], 16))
        codes = (places[..., 0] | places[..., 1] << 2)[row, column // 4]
        words = (codes << 4 * np.arange(8)).sum(-1).astype(np.uint32)
        lane = np.arange(32)
        for selector in range(layout["selectors"]):
            used = (lane // 2 % 2 == selector) | (layout["selectors"] == 1)
            others = np.where(used, words, 0x44444444).astype(np.uint32)[None]
            assert np.array_equal(mma_emulation.multiply(shape, dtype, *given, others, selector)[0], whole), (shape, selector)
            if layout["selectors"] == 2:
                wrong = mma_emulation.multiply(shape, dtype, *given, others, 1 - selector)[0]
                assert not np.array_equal(wrong, whole), "the mutation was not seen"


# (sizes, strides) of a lane's number and of one of its numbers, fastest first -> row + rows * column. A's columns are those of
# the dense matrix, two of each four being stored; a stride of 0 is for lanes that hold the same.
CUTE = {
    "m16n8k32": {
        "A": (((4, 8), (64, 1)), ((2, 2, 2), (32, 8, 256))),
        "B": (((4, 8), (16, 1)), ((2, 4), (8, 64))),
        "C": (((4, 8), (32, 1)), ((2, 2), (16, 8))),
        "E": (((2, 2, 8), (256, 0, 1)), ((16, 2), (16, 8))),
        "selectors": 2,
    },
    "m16n8k64": {
        "A": (((4, 8), (128, 1)), ((4, 2, 2), (32, 8, 512))),
        "B": (((4, 8), (32, 1)), ((4, 4), (8, 128))),
        "C": (((4, 8), (32, 1)), ((2, 2), (16, 8))),
        "E": (((2, 2, 8), (8, 512, 1)), ((32,), (16,))),
        "selectors": 1,
    },
}


def by_layout(layout, rows):
    """(row, column) of each of a lane's numbers, both [32, numbers]."""
    lane, number = (
        np.dot(strides[::-1], np.unravel_index(np.arange(np.prod(sizes)), sizes[::-1])) for sizes, strides in layout
    )
    at = lane[:, None] + number[None, :]
    return at % rows, at // rows


def registers(lanes, dtype):
    """Small whole numbers [32, n] as the registers [1, 32, 4] that hold them."""
    lanes = np.ascontiguousarray(lanes)
    if dtype != "bf16":
        return lanes.astype(np.int8 if dtype == "s8" else np.float16).view(np.uint32)[None]
    return (lanes.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)[None]


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1)
    mma_emulation.install()
    for name in sys.argv[1:]:
        if name != "every":
            CHECKS[name]()
