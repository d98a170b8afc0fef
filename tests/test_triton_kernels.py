"""The Triton kernels without a GPU: their numbers in the interpreter, and what they compile to for sm_80 and sm_90.

What is not known here: their numbers and their speed on a GPU.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

triton_build = pytest.importorskip("fxc_kernels.triton_build", reason="no Triton on this platform")
import triton  # noqa: E402

from fxc_kernels import triton_int4_linear, triton_scaled_mm, triton_weight_only  # noqa: E402
from fxc_kernels.triton_tile import Config, check_activation, choose  # noqa: E402

SCRIPT = Path(__file__).with_name("triton_interpreted.py")
CHECKS = [
    node.name.removeprefix("check_")
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
SHIPPED = [(chip, build) for chip in (80, 90) for build in triton_build.builds(chip)]
NAMES = [f"sm_{chip} {build.name}" for chip, build in SHIPPED]


# Triton 3.6 turns arrays of one number into integers, which NumPy refuses since 2.4.
INTERPRETER_WORKS = Version(triton.__version__) >= Version("3.7") or Version(numpy.__version__) < Version("2.4")


@pytest.mark.skipif(not INTERPRETER_WORKS, reason="this Triton's interpreter and this NumPy do not go together")
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_follow_their_references(check):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, SCRIPT, check], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("chip", "build"), SHIPPED, ids=NAMES)
def test_a_shipped_configuration_compiles_well(chip, build):
    made = triton_build.compile_for(build, chip)
    assert made.spilled == 0
    assert made.shared <= triton_build.SHARED_LIMIT[chip]
    assert made.instructions > 0 or not build.instruction, f"no {build.instruction}"
    assert made.wide > 0, f"no 128-bit load of {build.wide}"


FIRST = {build.kernel: build for _, build in reversed(SHIPPED)}


@pytest.mark.parametrize("build", FIRST.values(), ids=[build.kernel.__name__ for build in FIRST.values()])
def test_sizes_of_one_compile_too(build):
    """A size of 1 is a constant to Triton, not a number of the kernel's own, and that only happens on a launch: the
    interpreter does not do it, and one row is the case that matters most."""
    sizes = [name for name, value in build.arguments.items() if value == "i32"]
    for ones in {tuple(name for name in sizes if name == "M"), tuple(sizes)}:
        triton_build.compile_for(_changed(build, dict.fromkeys(ones, 1)), 80)


def test_every_product_for_tensor_cores_says_which_instruction_it_needs():
    words = ("skinny", "gemm", "decompress")
    assert all(build.instruction for _, build in SHIPPED if any(word in build.name for word in words))
    assert len(set(NAMES)) == len(NAMES)


def test_the_checks_of_compiled_kernels_see_faults():
    build = next(build for chip, build in SHIPPED if chip == 80 and build.name.startswith("int8 gemm 128x128x64"))
    changed = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128}
    large = triton_build.compile_for(_changed(build, changed, instruction="wgmma"), 80)
    assert large.spilled > 0 and large.shared > triton_build.SHARED_LIMIT[80] and large.instructions == 0
    assert triton_build.compile_for(_changed(build, {}, wide="nothing"), 80).wide == 0
    assert triton_build.compile_for(_changed(build, {"BLOCK_K": 32, "BLOCK_N": 16}), 80).wide == 0


def _changed(build, arguments, **fields):
    return triton_build.Build(**{**vars(build), "arguments": build.arguments | arguments, **fields})


def test_fp8_products_are_refused_before_sm_89():
    names = {chip: [name for name in NAMES if name.startswith(f"sm_{chip} fp8")] for chip in (80, 90)}
    assert names[80] and all("weight-only" in name or "dequantize" in name for name in names[80])
    assert any("fp8 gemm" in name for name in names[90])
    with pytest.raises(RuntimeError, match=r"8\.9 or newer, and this one is 8\.0: use fp8 weight-only here, or int8"):
        triton_scaled_mm.check_fp8(80)
    triton_scaled_mm.check_fp8(89)


def test_wrong_arguments_are_refused():
    x, q, ones = torch.zeros(2, 64), torch.zeros(3, 64, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match="unknown activation"):
        check_activation("relu6")
    with pytest.raises(TypeError, match="both be int8"):
        triton_scaled_mm.scaled_mm(x, ones, None, q, ones)
    with pytest.raises(ValueError, match="of one K"):
        triton_scaled_mm.scaled_mm(q[:, :32].contiguous(), ones, None, q, ones)
    wide = torch.zeros(1, triton_scaled_mm.INT32_COLUMNS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="can overflow"):
        triton_scaled_mm.scaled_mm(wide, ones[:1], None, wide, ones[:1])
    with pytest.raises(TypeError, match="int8 or float8_e4m3fn"):
        triton_weight_only.weight_only_linear(x, x, ones)
    with pytest.raises(ValueError, match="does not divide"):
        triton_int4_linear.prepack(torch.zeros(2, 48, dtype=torch.uint8), 64)


def test_a_table_has_a_configuration_for_every_number_of_rows():
    tables = [triton_scaled_mm.CONFIGS, triton_weight_only.CONFIGS, *triton_int4_linear.CONFIGS.values()]
    for table in tables:
        for chip in (80, 86, 89, 90, 100):
            assert all(isinstance(choose(table, chip, rows), Config) for rows in range(1, 65))
    assert choose(triton_scaled_mm.CONFIGS, 89, 4096) == triton_scaled_mm.CONFIGS[80][-1]


def test_prepacking_int4_only_moves_halves():
    weight = torch.randint(0, 256, (3, 128), dtype=torch.uint8)
    for group in triton_int4_linear.GROUPS:
        packed = triton_int4_linear.prepack(weight, group)
        halves = torch.stack([weight & 15, weight >> 4], dim=-1).reshape(3, -1, group)
        again = torch.cat([packed.reshape(3, -1, group // 2) & 15, packed.reshape(3, -1, group // 2) >> 4], dim=-1)
        assert torch.equal(halves, again)
