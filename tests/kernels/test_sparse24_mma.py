"""Prepacked 2:4 weights on sparse tensor cores without a GPU: the packing, the kernel with its instruction emulated, and
what it compiles to for sm_80 and sm_90. What is not known here: its numbers and its speed on a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repo import REPO

from fxc.schemes import sparse24
from fxc_kernels.cuda.sparse24_prepacked import Prepacked, prepack, row_sums, unpack

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

triton_build = pytest.importorskip("benchmarks.triton_build", reason="no Triton on this platform")
import triton  # noqa: E402
from builds import each_once  # noqa: E402
from interpreter import in_parts, needs_interpreter  # noqa: E402

from fxc_kernels.cuda import sparse24_mma, sparse24_prepacked_linear  # noqa: E402
from fxc_kernels.cuda.tile import Config, choose  # noqa: E402

SCRIPT = REPO / "tests" / "helpers" / "sparse24_interpreted.py"
# test_triton_kernels.py compiles the others too: float16 and products in parts, which differ in types and epilogue.
SHIPPED = [
    (chip, build)
    for chip in (80, 90)
    for build in sparse24_mma.builds(chip)
    if build.arguments["KIND"] != "f16" and build.arguments["parts"] is None
]


def weight(outputs, columns, dtype):
    generator = torch.Generator().manual_seed(outputs * columns)
    dense = torch.randint(-127, 128, (outputs, columns), generator=generator).to(dtype)
    return sparse24.pack(sparse24.mask_by_magnitude(dense.float()).to(dtype))


@needs_interpreter
@pytest.mark.parametrize("checks", in_parts(SCRIPT, 2), ids=" ".join)
def test_the_kernels_follow_their_references(checks):
    done = subprocess.run([sys.executable, SCRIPT, *checks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("outputs", [0, 1, 16, 33])
@pytest.mark.parametrize("columns", [8, 64, 72, 328])
def test_prepacking_is_exact(dtype, outputs, columns):
    values, meta = weight(outputs, columns, dtype)
    packed = prepack(values, meta)
    again = unpack(packed)
    assert torch.equal(again[0], values) and torch.equal(again[1], meta)
    # It only moves values, fills up with zeros, and every four bits are places that ascend.
    assert torch.equal(packed.values.flatten().sort().values[packed.values.flatten().sort().values != 0],
                       values.flatten().sort().values[values.flatten().sort().values != 0])  # fmt: skip
    codes = packed.meta.view(torch.uint8)
    assert torch.isin(torch.cat([codes & 15, codes >> 4]), torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE])).all()
    if dtype == torch.int8:
        assert torch.equal(row_sums(packed), values.sum(dim=1, dtype=torch.int32))
    if outputs:
        values[0, 0] += 1
        assert not torch.equal(prepack(values, meta).values, packed.values)


def test_a_prepacked_weight_has_the_bytes_that_it_should():
    for dtype, bytes_a_weight in ((torch.bfloat16, 1.125), (torch.int8, 0.625)):
        packed = prepack(*weight(32, 128, dtype))
        assert packed.values.nbytes + packed.meta.nbytes == bytes_a_weight * 32 * 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_metadata_is_in_the_order_of_cutlass(dtype):
    """CUTLASS's reorder_meta (tools/util/include/cutlass/util/host_reorder.h) for a tile of 32 rows, of which a warp's lanes
    read one 32-bit word each: an order that runs on GPUs. int8 has the columns of x in another order, which is undone first."""
    values, meta = weight(32, 64, dtype)
    codes = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1)
    if dtype == torch.int8:
        codes = codes.reshape(32, 4, 4).transpose(1, 2).flatten(1)
    ours = prepack(values, meta).meta[:, 0]
    nibbles = 4 if dtype == torch.bfloat16 else 8
    elements = (codes.reshape(32, -1, nibbles).long() << 4 * torch.arange(nibbles)).sum(-1)
    group, interweave = (32, 4) if dtype == torch.bfloat16 else (16, 2)
    moved = torch.empty_like(elements)
    for row in range(32):
        for column in range(elements.shape[1]):
            to, at = row // group * group + row % 8 * interweave + row % group // 8, column
            if to % 2 != at % 2:
                to, at = (to + 1, at - 1) if to % 2 == 0 else (to - 1, at + 1)
            moved[to, at] = elements[row, column]
    if dtype == torch.bfloat16:
        # Two elements of 16 bits are a word, and lanes 2 and 3 of four hold rows 16 to 31; here, columns 32 to 63.
        words = (moved[:, 0::2] | moved[:, 1::2] << 16).reshape(8, 2, 2, 2)
        expected = words.permute(1, 0, 3, 2).reshape(2, 32)
    else:
        # Two elements of 32 bits are side by side, which are two lanes.
        expected = moved.reshape(2, 16, 1, 2).transpose(1, 2).reshape(2, 32)
    assert torch.equal(ours.long() & 0xFFFFFFFF, expected)


def test_what_cannot_be_prepacked_is_refused():
    values, meta = weight(16, 64, torch.bfloat16)
    with pytest.raises(TypeError, match=r"not torch\.float32"):
        prepack(values.float(), meta)
    for columns in (0, 3, 6):
        with pytest.raises(ValueError, match="of one K above 0"):
            prepack(values[:, :columns], meta[:, : columns // 4])
    with pytest.raises(ValueError, match="must ascend"):
        prepack(values, meta * 0)
    packed = prepack(values, meta)
    with pytest.raises(ValueError, match="not the \\(2, 1\\) tiles"):
        Prepacked(packed.values, packed.meta, 17, 64)
    with pytest.raises(TypeError, match="meta int32"):
        Prepacked(packed.values, packed.meta.float(), 16, 64)


def test_wrong_arguments_are_refused():
    packed, ones = prepack(*weight(16, 64, torch.bfloat16)), torch.ones(16)
    with pytest.raises(TypeError, match="of the prepacked values' dtype"):
        sparse24_prepacked_linear.prepacked_linear(torch.zeros(2, 64), packed)
    with pytest.raises(ValueError, match="do not fit"):
        sparse24_prepacked_linear.prepacked_linear(torch.zeros(2, 32, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="bias must be 16"):
        sparse24_prepacked_linear.prepacked_linear(torch.zeros(2, 64, dtype=torch.bfloat16), packed, ones[:3])
    with pytest.raises(TypeError, match="must be int8"):
        sparse24_prepacked_linear.prepacked_scaled_mm(torch.zeros(2, 64), ones[:2], None, packed, ones)
    for config, why in ((Config(None, 4, 16, 64, 4, 1), "8, 16 and 64"), (Config(None, 8, 128, 64, 2, 1), "4 warps")):
        with pytest.raises(ValueError, match=why):
            sparse24_mma.check_config(config)


def test_a_table_has_a_configuration_for_every_number_of_rows():
    for table in (sparse24_mma.CONFIGS, sparse24_mma.INT8_CONFIGS):
        for rows in range(1, 65):
            sparse24_mma.check_config(choose(table, 90, rows))


@pytest.mark.parametrize(("chip", "build"), each_once(SHIPPED))
def test_the_machine_code_is_what_was_meant(chip, build, tmp_path):
    made = triton_build.compiled(build, chip)
    check_one_number_a_thread(made.asm["ttgir"], build.warps)
    text = disassembled(made.asm["cubin"], tmp_path)
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", text, re.MULTILINE)
    name = "IMMA.SP.16864.S8.S8" if build.arguments["KIND"] == "s8" else "HMMA.SP.16832.F32.BF16"
    products = [number for number, each in enumerate(code) if each.startswith(name)]
    arguments = build.arguments
    down = 2 if arguments["BLOCK_N"] >= 32 else 1
    steps = 1 if arguments["KIND"] == "s8" else 2
    assert len(products) == arguments["RUN"] * steps * down * (arguments["BLOCK_M"] // 8)
    # All that a turn needs of the weight is on its way before the first product, and the loop knows no shared memory.
    ahead = code[: products[0]]
    assert sum(bool(re.fullmatch(r"LDG\.E\.(EF\.)?128", each)) for each in ahead) >= arguments["RUN"] * steps * down
    assert not any(each.startswith(("LDS", "STS", "LDGSTS", "BAR")) for each in code[: products[-1]])
    sums = 4 * build.warps * 32 * 4 * down * (arguments["BLOCK_M"] // 8)
    assert made.metadata.shared <= sums
    # The weight with the words of metadata, and with 8 bits x too, are all that is loaded wide; there is no byte to spill.
    assert not any(each.startswith(("LDL", "STL")) for each in code)


def check_one_number_a_thread(text, warps):
    """The instruction's lanes are those of its operands: number i of a tensor is lane i % 32 of warp i // 32."""
    layout = rf"(#\w+) = #ttg\.blocked<{{sizePerThread = \[1\], threadsPerWarp = \[32\], warpsPerCTA = \[{warps}\]"
    names = re.findall(layout, text)
    uses = [line for line in text.splitlines() if "tt.elementwise_inline_asm" in line and "mma.sp" in line]
    assert uses
    for line in uses:
        operands = re.findall(r"tensor<(\d+)x[if]32, (#\w+)>", line)
        assert len(operands) == 17 and all(size == str(32 * warps) and name in names for size, name in operands), line


def disassembled(cubin: bytes, folder: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = str(tool) if tool.exists() else shutil.which("nvdisasm")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([command, "-c", file], capture_output=True, text=True, check=True).stdout
