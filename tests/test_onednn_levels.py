"""int8 layers on CPUs that this one is not: oneDNN held to fewer instructions, each level in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPO

LEVELS = ("all", "AVX512_CORE_VNNI", "AVX512_CORE", "AVX2_VNNI", "AVX2")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "tests" / "onednn_levels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("level", LEVELS)
def test_int8_layers_are_right_at_every_level(level):
    done = run(level)
    assert done.returncode == 0, done.stderr
    # Without VNNI the CPU adds pairs of products in 16 bits. A level that this CPU lacks is taken as the next lower one.
    assert done.stdout.split()[-1] in (("float",) if level in ("AVX512_CORE", "AVX2") else ("exact", "float"))


def test_products_that_saturate_are_noticed():
    done = run("AVX2", "force")
    assert done.returncode != 0 and "AssertionError: int8_linear" in done.stderr


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


def test_no_product_of_the_example_runs_reference_code():
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "FXC_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", VERBOSE], capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0 and "layers " in done.stdout, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if ",exec,cpu," in line]
    products = {(row[5], row[6]) for row in rows if row[5] in ("matmul", "inner_product")}
    assert products, "oneDNN says nothing of what it runs"
    assert not {p for p in products if p[1].startswith("ref")}, json.dumps(sorted(products))
