"""A backend, a device or a dtype that does not exist, or not on this machine, is refused before any work is done."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxc
from fxc.cli.app import app
from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError
from fxc.lower.target import check_target, warm_up

X = torch.ones(2, 64)
WRONG = {
    "a backend misspelt": {"backend": "indctor"},
    "a backend in capitals": {"backend": "Eager"},
    "an empty backend": {"backend": ""},
    "a number for a backend": {"backend": 3},
    "a list for a backend": {"backend": ["eager"]},
    "a function for a backend": {"backend": torch.compile},
    "a vendor's backend": {"backend": "tensorrt"},
    "a device misspelt": {"device": "gpu"},
    "an empty device": {"device": ""},
    "a device with a space": {"device": "cpu "},
    "a number of a device": {"device": "cuda:99"},
    "a negative number of a device": {"device": "cuda:-1"},
    "a number without a device": {"device": 99},
    "a fraction": {"device": 3.5},
    "true": {"device": True},
    "no number of a device": {"device": "cuda:a"},
    "a second cpu": {"device": "cpu:1"},
    "a device of another kind": {"device": "mps"},
    "a torch device of another kind": {"device": torch.device("meta")},
    "a list for a device": {"device": ["cpu"]},
    "a tensor for a device": {"device": X},
    "auto, as in other libraries": {"device": "auto"},
}
WRONG_DTYPES = {
    "of weights": "int8", "misspelt": "flaot32", "empty": "", "short": "bf16", "None": None, "a number": 16,
    "float64": torch.float64, "int8": torch.int8, "bool": torch.bool, "a list": ["float32"], "a type": float,
    "half, misspelt": "torch.half",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    return fxc.optimize(nn.Linear(64, 64).eval(), (X,), "")


@pytest.fixture(scope="module")
def artifact(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "a"
    compiled.save(folder)
    return folder


class Untouchable(nn.Linear):
    def forward(self, x):
        raise AssertionError("the model was called")


def refused(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.hint, caught.value
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("wrong", WRONG)
def test_it_is_refused_everywhere(wrong, compiled, artifact):
    target = WRONG[wrong]
    refused(lambda: check_target(target.get("device"), target.get("backend")))
    refused(lambda: fxc.optimize(Untouchable(64, 64), (X,), "", **target))
    refused(lambda: fxc.load(artifact, **target))
    refused(lambda: CompiledModel(compiled.program, {}, **target))


@pytest.mark.parametrize("wrong", WRONG_DTYPES)
def test_dtypes(wrong, tmp_path):
    refused(lambda: fxc.optimize(Untouchable(64, 64), (X,), "", dtype=WRONG_DTYPES[wrong]))
    refused(lambda: fxc.optimize(tmp_path, None, "", dtype=WRONG_DTYPES[wrong]))


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "cpu:0"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_exists_is_taken(device, backend, artifact):
    assert fxc.load(artifact, device, backend)(X).shape == (2, 64)


@pytest.mark.fault(31)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there(device, artifact):
    refused(lambda: fxc.load(artifact, device=device))
    refused(lambda: fxc.optimize(Untouchable(64, 64), (X,), "", device=device))


@pytest.mark.parametrize("option", [
    "run --text a --backend indctor", "run --text a --backend=", "run --text a --device gpu", "run --text a --device=",
    "eval --backend Inductor", "eval --device cuda:99", "eval --dtype int4", "eval --dtype=", "bench model --backend tensorrt",
    "bench model --device cuda:-1", "bench model --dtype=", "bench model --dtype fp16", "compile --device tpu",
    "compile --device mps", "compile --dtype fp16", "compile --dtype=", "compile --device cpu:7",
])  # fmt: skip
def test_the_command_line_refuses_it_in_one_line(option, artifact, tmp_path):
    words = [*option.split(), str(artifact)]
    words += ["-o", str(tmp_path / "out")] if words[0] == "compile" else []
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and "fault of fxc" not in result.output
    assert not (tmp_path / "out").exists()


def test_kernels_are_begun_while_a_model_is_read(monkeypatch):
    begun = []
    monkeypatch.setattr("fxc_kernels.cpu.native.start", lambda: begun.append("cpu"))
    for device in (None, "cpu", torch.device("cpu"), "cuda"):
        warm_up(device)
    assert begun == ["cpu"] * 3
