"""What passes learn from data while a model is read piece by piece: the bytes of an ordinary compilation."""

from __future__ import annotations

import pytest
import torch
from tiny import save

import fxc
from fxc.artifact import store
from fxc.artifact.spill import Spill

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save("qwen2", tmp_path_factory.mktemp("tiny") / "model")


def options_of(passes, text):
    return {"passes": passes, "calib": text, "calib_samples": 9, "calib_length": 24, "budget": 9.0, "layer_budget": 9.0}


def compare(folder, passes, text, tmp_path):
    whole = fxc.optimize(folder, **options_of(passes, text))
    made = fxc.optimize(folder, **options_of(passes, text), stream=True)
    assert str(made.program) == str(whole.program)
    made.save(tmp_path / "out")
    read = store.read(tmp_path / "out").program
    assert read.constants.keys() == whole.program.constants.keys()
    differ = [name for name, tensor in whole.program.constants.items() if not torch.equal(read.constants[name], tensor)]
    assert differ == []


@pytest.mark.parametrize("passes", PASSES)
def test_it_learns_what_an_ordinary_compilation_learns(passes, tiny, text, tmp_path):
    compare(tiny, passes, text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_so_it_does_of_a_trained_model(passes, pylm_dir, text, tmp_path):
    compare(pylm_dir, passes, text, tmp_path)


@pytest.mark.parametrize("count", [0, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(count, tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr("fxc.ir.store.PART_BYTES", 10_000)
    options = options_of("int4:group=32:algorithm=gptq", text) | {"stream": True}
    fxc.optimize(tiny, **options).save(tmp_path / "undisturbed")
    write, left = Spill.write, [count]

    def killed(self, tensors):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            fxc.optimize(tiny, **options, resume=tmp_path / "saved")
    fxc.optimize(tiny, **options, resume=tmp_path / "saved").save(tmp_path / "out")
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "undisturbed"))
    assert ours == theirs
