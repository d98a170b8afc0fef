"""What passes learn from data while a model is read piece by piece: the bytes of an ordinary compilation."""

from __future__ import annotations

import pytest
import torch

import fxc
from fxc.artifact import store

TEXT = "\n".join(f"def f{n}(x, y={n}):\n    return x * {n} + y  # the sum of {n} and more\n" for n in range(120))
PASSES = [
    "int4:group=32:algorithm=gptq", "int8:algorithm=gptq", "int4:group=32:algorithm=grid", "smooth,int8", "awq,int4:group=32",
    "sparse24:criterion=sparsegpt", "sparse24:criterion=wanda,int8", "prune:heads=0.5:ffn=0.25:criterion=wanda,int8",
    "prune:ffn=0.25:criterion=taylor", "int8:mode=static", "sparsify:sparsity=0.5:criterion=wanda",
    "int4:group=32:algorithm=qronos",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("passes", PASSES)
def test_it_learns_what_an_ordinary_compilation_learns(passes, pylm_dir, text, tmp_path):
    options = {"passes": passes, "calib": text, "calib_samples": 9, "calib_length": 24, "budget": 9.0, "layer_budget": 9.0}
    whole = fxc.optimize(pylm_dir, **options)
    made = fxc.optimize(pylm_dir, **options, stream=True)
    assert str(made.program) == str(whole.program)
    made.save(tmp_path / "out")
    read = store.read(tmp_path / "out").program
    assert read.constants.keys() == whole.program.constants.keys()
    differ = [name for name, tensor in whole.program.constants.items() if not torch.equal(read.constants[name], tensor)]
    assert differ == []
