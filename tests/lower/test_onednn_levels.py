"""int8 layers on CPUs that this one is not: oneDNN held to fewer instructions, each level in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from repo import REPO
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc_kernels import int8_exact, int8_linear
from fxc_kernels.cpu import int8_product

LEVELS = ("all", "AVX512_CORE_VNNI", "AVX512_CORE", "AVX2_VNNI", "AVX2")


@pytest.fixture(scope="module")
def at_levels(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """Level, or "force" -> (exit status, stdout, stderr). All are forks of one process, which has imported torch and fxc."""
    out = tmp_path_factory.mktemp("levels")
    command = [sys.executable, str(REPO / "tests" / "helpers" / "onednn_levels.py"), str(out), *LEVELS, "force"]
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "FXC_CPU_LEVEL": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (code, *((out / f"{name}.{each}").read_text() for each in ("out", "err"))) for name, code in codes.items()}


def products(output: str) -> set[tuple[str, str]]:
    """(kind, implementation) of every product that oneDNN says it ran."""
    rows = [line.split(",") for line in output.splitlines() if ",exec,cpu," in line]
    return {(row[5], row[6]) for row in rows if row[5] in ("matmul", "inner_product")}


def of_reference_code(ran: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {each for each in ran if each[1].startswith("ref")}


@pytest.mark.parametrize("level", LEVELS)
def test_int8_layers_are_right_at_every_level(level, at_levels):
    code, stdout, stderr = at_levels[level]
    assert code == 0, stderr
    # Without VNNI the CPU adds pairs of products in 16 bits. A level that this CPU lacks is taken as the next lower one.
    assert stdout.splitlines()[-1] in (("in two",) if level in ("AVX512_CORE", "AVX2") else ("at once", "in two"))
    ran = products(stdout)
    assert ran and not of_reference_code(ran), sorted(ran)


def test_reference_code_is_recognized():
    line = "onednn_verbose,v1,primitive,exec,cpu,matmul,{},undef,src:s8::blocked:ab::f0,,,2x64:64x32,0.5"
    assert of_reference_code(products(line.format("ref_int8:any"))) == {("matmul", "ref_int8:any")}
    assert not of_reference_code(products(line.format("brg_matmul:avx512_core_vnni")))


def test_products_that_saturate_are_noticed(at_levels):
    code, _, stderr = at_levels["force"]
    assert code != 0 and "AssertionError: int8_linear" in stderr


VERBOSE = """
import torch, fxc
from fxc.lower import choose
torch.set_num_threads(1)
model = fxc.optimize("examples/pylm", passes="int8", verify=False)
for keep in (False, True):
    model.keep_compressed, model._lowered = keep, None
    for shape in ((1, 1), (1, 24), (3, 50)):
        model(torch.ones(shape, dtype=torch.int64))
print("layers " + str(len(model.layers)))
"""


@pytest.mark.slow
def test_no_product_of_the_example_runs_reference_code():
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "FXC_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", VERBOSE], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0 and "layers " in done.stdout, done.stderr
    ran = products(done.stdout)
    assert ran, "oneDNN says nothing of what it runs"
    assert not of_reference_code(ran), sorted(ran)


def test_the_probe_is_not_misled_by_what_surrounds_it():
    """It may be asked for first while a program is traced, or under another default device."""
    probes = int8_product.products_saturate, int8_product.int8_is_exact, int8_linear.int_mm_is_exact
    right = [probe.__wrapped__() for probe in probes]
    for surroundings in (FakeTensorMode(), torch.device("meta"), torch.inference_mode()):
        with surroundings:
            assert [probe.__wrapped__() for probe in probes] == right


def test_one_wrong_row_count_is_noticed():
    def product_of(weight, wrong):
        return lambda q: (q.double() @ weight.double().t()) / (1 + (len(q) == wrong))

    assert int8_exact.is_exact(lambda weight: product_of(weight, None))
    for rows in int8_exact.ROWS:
        assert not int8_exact.is_exact(lambda weight, rows=rows: product_of(weight, rows))
