"""The Triton kernels without a GPU: their numbers in the interpreter, and what they compile to for sm_80 and sm_90.

What is not known here: their numbers and their speed on a GPU.
"""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from repo import REPO

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

triton_build = pytest.importorskip("benchmarks.triton_build", reason="no Triton on this platform")
from builds import each_once  # noqa: E402
from interpreter import in_parts, needs_interpreter  # noqa: E402

from fxc_kernels.cuda import int4_linear, interleaved, scaled_mm, weight_only  # noqa: E402
from fxc_kernels.cuda.tile import Config, choose, output_columns  # noqa: E402

SCRIPT = REPO / "tests" / "helpers" / "triton_interpreted.py"
SHIPPED = [(chip, build) for chip in (80, 90) for build in triton_build.builds(chip)]
# sm_89 runs what sm_80 runs, and its own float8 products.
FLOAT8 = [(89, build) for build in scaled_mm.builds(89) if build.name.startswith("fp8 ")]
NAMES = [f"sm_{chip} {build.name}" for chip, build in SHIPPED]


@needs_interpreter
@pytest.mark.parametrize("checks", in_parts(SCRIPT, 2), ids=" ".join)
def test_kernels_follow_their_references(checks):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *checks], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def _is_repeated(chip, build) -> bool:
    """The kernels for sparse tensor cores take longest, and are the same instructions on both chips: on the older one types and
    epilogues that the newer one has are left out."""
    return chip == 80 and "mma.sp" in build.name and (build.arguments["KIND"] == "f16" or build.arguments["parts"] is not None)


@pytest.mark.parametrize(("chip", "build"), each_once([each for each in SHIPPED + FLOAT8 if not _is_repeated(*each)]))
def test_a_shipped_configuration_compiles_well(chip, build):
    made = triton_build.compile_for(build, chip)
    assert made.spilled == 0
    assert made.shared <= triton_build.SHARED_LIMIT[89 if chip == 80 else chip]
    assert made.instructions > 0 or not build.instruction, f"no {build.instruction}"
    assert made.wide > 0, f"no 128-bit load of {build.wide}"


def _representatives():
    """(chip, build) of every kernel on each chip that has it, in the configuration with the largest tile; of the kernel for
    sparse tensor cores the smallest, because it takes long to compile."""
    found = {}
    for chip, build in SHIPPED:
        size = build.arguments.get("BLOCK_M", 1) * build.arguments.get("BLOCK_N", 1)
        size = -size if "mma.sp" in build.name else size
        before = found.get((chip, build.kernel))
        if before is None or size > before[0]:
            found[chip, build.kernel] = size, build
    return [(chip, build) for (chip, _), (_, build) in found.items()]


REPRESENTATIVES = _representatives()
# The oldest chip that has a kernel, and the newest, where it may be compiled to other instructions.
OLDEST = {build.kernel: (chip, build) for chip, build in reversed(REPRESENTATIVES)}
NEWEST = {build.kernel: (chip, build) for chip, build in REPRESENTATIVES}


def _variants(build):
    """Name -> `build` as other launches have it compiled, two or three changes at a time: each costs a compilation."""
    arguments = build.arguments
    floats = [name for name, value in arguments.items() if value == "*bf16"]
    # One part of K: the products then go through the epilogue right away.
    whole = {"parts": None} if "part_k" in arguments else {}
    tail = {"WHOLE_K": False} if "WHOLE_K" in arguments else {}

    def activation(name):
        return whole | {"ACTIVATION": name} if "ACTIVATION" in arguments else {}

    half = dict.fromkeys(floats, "*fp16") | ({"KIND": "f16"} if arguments.get("KIND") == "bf16" else {})
    instruction = build.instruction.replace("bf16", "f16")
    made = {
        "fp16, gelu": _changed(build, half | activation("gelu"), instruction=instruction),
        "silu, tail of K": _changed(build, activation("silu") | tail),
    }
    # Weight-only products of float32 rows have no tensor-core kernel, and the TMA's kernel stores no float32.
    if floats and "bf16" not in build.instruction and build.wide != "tma":
        made["fp32"] = _changed(build, dict.fromkeys(floats, "*fp32"))
    if "bias" in arguments:
        made["silu_mul, no bias"] = _changed(build, activation("silu_mul") | {"bias": None})
    if "M" in arguments:
        made["one row"] = _changed(build, {"M": 1})
        made["gelu_tanh, odd M"] = _changed(build, activation("gelu_tanh"), unaligned=("M",))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "build"), NEWEST.values(), ids=[kernel.__name__ for kernel in NEWEST])
def test_a_kernel_compiles_well_in_every_variant(chip, build):
    for name, variant in _variants(build).items():
        made = triton_build.compile_for(variant, chip)
        assert made.spilled == 0 and made.shared <= triton_build.SHARED_LIMIT[chip], (name, made)
        assert made.instructions > 0 or not build.instruction, (name, made)
        assert made.wide > 0 or name == "fp32", (name, made)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "build"), OLDEST.values(), ids=[kernel.__name__ for kernel in OLDEST])
def test_a_kernel_compiles_for_unaligned_and_smallest_sizes(chip, build):
    """Without alignment, numbers are loaded and stored one by one, and registers may spill. A size of 1 is a constant to
    Triton, not a number of the kernel's own, and that only happens on a launch: the interpreter does not do it."""
    tail = {"WHOLE_K": False} if "WHOLE_K" in build.arguments else {}
    sizes = [name for name, value in build.arguments.items() if value == "i32"]
    odd_outputs = _changed(build, {}, unaligned=("N",))
    nothing_aligned = _changed(build, tail, unaligned=tuple(build.arguments))
    for changed in (odd_outputs, nothing_aligned, _changed(build, dict.fromkeys(sizes, 1))):
        assert triton_build.compile_for(changed, chip).shared <= triton_build.SHARED_LIMIT[chip]


TAILED = [build for chip, build in SHIPPED if chip == 90 and build.name.startswith("fp8 ") and "WHOLE_K" in build.arguments]


@pytest.mark.slow
@pytest.mark.parametrize("build", TAILED, ids=[build.name for build in TAILED])
def test_float8_kernels_compile_with_a_tail_of_k(build):
    assert triton_build.compile_for(_changed(build, {"WHOLE_K": False}), 90).spilled == 0


def test_warp_groups_meet_before_what_they_read_is_overwritten():
    """Each of two groups of four warps waits for its own wgmma only; the tile that both read may be loaded anew only after a
    barrier that comes after both waits."""
    events = re.compile(r"wgmma\.wait_group|bar\.sync|cp\.async\.(?:cg|bulk\.tensor)")
    seen = 0
    for build in (build for chip, build in SHIPPED if chip == 90 and "gemm" in build.name and build.warps == 8):
        found = events.findall(triton_build.compiled(build, 90).asm["ptx"])
        after = [later for event, later in itertools.pairwise(found) if event == "wgmma.wait_group"]
        assert after and not any(event.startswith("cp.async") for event in after), build.name
        seen += 1
    assert seen >= 8


def test_float8_products_overlap():
    for build in (build for chip, build in SHIPPED if chip == 90 and "fp8" in build.name and "gemm" in build.name):
        assert "wgmma.wait_group.sync.aligned 1;" in triton_build.compiled(build, 90).asm["ptx"], build.name


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
        scaled_mm.check_fp8(80)
    scaled_mm.check_fp8(89)


def test_wrong_arguments_are_refused():
    x, q, ones = torch.zeros(2, 64), torch.zeros(3, 64, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match="unknown activation"):
        output_columns(4, "relu6")
    with pytest.raises(ValueError, match="3 columns are no pairs"):
        output_columns(3, "silu_mul")
    with pytest.raises(ValueError, match="is no configuration"):
        Config.parse("16x64 w4 s5")
    with pytest.raises(ValueError, match="must be alike"):
        interleaved.interleave(x, q)
    with pytest.raises(TypeError, match="both be int8"):
        scaled_mm.scaled_mm(x, ones, None, q, ones)
    with pytest.raises(ValueError, match="of one K"):
        scaled_mm.scaled_mm(q[:, :32].contiguous(), ones, None, q, ones)
    wide = torch.zeros(1, scaled_mm.INT32_COLUMNS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="can overflow"):
        scaled_mm.scaled_mm(wide, ones[:1], None, wide, ones[:1])
    with pytest.raises(TypeError, match="int8 or float8_e4m3fn"):
        weight_only.weight_only_linear(x, x, ones)
    with pytest.raises(ValueError, match="does not divide"):
        int4_linear.prepack(torch.zeros(2, 48, dtype=torch.uint8), 64)


def test_a_table_has_a_configuration_for_every_number_of_rows():
    tables = [scaled_mm.CONFIGS, weight_only.CONFIGS, *int4_linear.CONFIGS.values()]
    for table in tables:
        for chip in (80, 86, 89, 90, 100):
            assert all(isinstance(choose(table, chip, rows), Config) for rows in range(1, 65))
    for chip in (89, 120):  # which has as little shared memory
        assert choose(scaled_mm.CONFIGS, chip, 4096) == scaled_mm.CONFIGS[80][-1]
    assert choose(scaled_mm.CONFIGS, 90, 1024).tma and not choose(scaled_mm.CONFIGS, 90, 1023).tma


def test_k_is_cut_only_where_a_weight_has_too_few_rows_for_the_chip():
    configs, splits = scaled_mm.CONFIGS, {}
    for outputs in (64, 3584, 8192, 37888):
        splits[outputs] = choose(configs, 90, 16, outputs, processors=132).split
    # Tiles of 64 rows: 1, 56, 128 and 592 programs before K is cut; 264 are enough.
    assert splits == {64: 4, 3584: 4, 8192: 3, 37888: 1}
    assert choose(configs, 90, 16, 8192, processors=66).split == 2


def test_a_configuration_reads_what_it_wrote():
    for table in (scaled_mm.CONFIGS, weight_only.CONFIGS, *int4_linear.CONFIGS.values()):
        for config in (each for configs in table.values() for each in configs):
            assert Config.parse(str(config)) == replace(config, rows=None, fill=Config.fill)


def test_interleaving_alternates_rows_of_every_dtype():
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.int32):
        gate, up = torch.arange(6).reshape(3, 2).to(dtype), (10 + torch.arange(6)).reshape(3, 2).to(dtype)
        merged = interleaved.interleave(gate, up)
        assert torch.equal(merged[0::2].float(), gate.float()) and torch.equal(merged[1::2].float(), up.float())
    product = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    silu = torch.nn.functional.silu
    assert torch.equal(interleaved.silu_mul(product), silu(product[:, [0, 2]]) * product[:, [1, 3]])


def test_prepacking_int4_only_moves_halves():
    weight = torch.randint(0, 256, (3, 128), dtype=torch.uint8)
    for group in int4_linear.GROUPS:
        packed = int4_linear.prepack(weight, group)
        halves = torch.stack([weight & 15, weight >> 4], dim=-1).reshape(3, -1, group)
        again = torch.cat([packed.reshape(3, -1, group // 2) & 15, packed.reshape(3, -1, group // 2) >> 4], dim=-1)
        assert torch.equal(halves, again)
