"""What people pass in the place of a model by mistake is refused before anything else, with what to give instead."""

import collections
import io
import pathlib
import types

import pytest
import torch
import transformers
from tiny import byte_tokenizer
from torch import nn

import fxc
from fxc.errors import FxcError, UsageError

X = torch.ones(4, 64)


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.register_buffer("count", nn.parameter.UninitializedBuffer())

    def forward(self, x):
        return self.first(x)


def double(x: torch.Tensor):
    return x * 2


def pipeline():
    return types.SimpleNamespace(model=mlp(), tokenizer=byte_tokenizer(), task="text-classification")


def pipeline_of_diffusers():
    return types.SimpleNamespace(unet=mlp(), vae=mlp(), scheduler=None)


def exported(model=None):
    return torch.export.export(model or mlp(), (X,))


WRONG = {
    "state dict": (lambda: mlp().state_dict(), "load_state_dict"),
    "ordered dict": (lambda: collections.OrderedDict(mlp().named_parameters()), "load_state_dict"),
    "plain dict of weights": (lambda: dict(mlp().state_dict()), "load_state_dict"),
    "checkpoint of a training run": (lambda: {"epoch": 3, "model": mlp().state_dict()}, "load_state_dict"),
    "checkpoint with a model": (lambda: {"epoch": 3, "model": mlp()}, "['model']"),
    "empty dict": (dict, "nn.Module"),
    "exported program": (exported, "that was exported"),
    "exported module": (lambda: exported().module(), "that was exported"),
    "exported module within another": (lambda: nn.Sequential(exported().module()), "that was exported"),
    "scripted": (lambda: torch.jit.script(mlp()), "scripted or traced"),
    "traced": (lambda: torch.jit.trace(mlp(), X), "scripted or traced"),
    "scripted function": (lambda: torch.jit.script(double), "nn.Module"),
    "scripted within another": (lambda: nn.Sequential(torch.jit.script(mlp())), "scripted or traced"),
    "lazy linear": (lambda: nn.LazyLinear(64), "call the model once"),
    "lazy within": (lambda: nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU()), "call the model once"),
    "lazy buffer": (Lazy, "call the model once"),
    "None": (lambda: None, "nn.Module"),
    "class": (lambda: nn.Linear, "Linear(...)"),
    "other class": (lambda: dict, "nn.Module"),
    "list of modules": (lambda: [mlp(), mlp()], "one model at a time"),
    "tuple": (lambda: (mlp(), X), "one model at a time"),
    "empty list": (list, "one model at a time"),
    "module list": (lambda: nn.ModuleList([nn.Linear(64, 64)]), "forward"),
    "module dict": (lambda: nn.ModuleDict({"a": nn.Linear(64, 64)}), "forward"),
    "tokenizer": (byte_tokenizer, "nn.Module"),
    "pipeline": (pipeline, "within it: .model"),
    "diffusion pipeline": (pipeline_of_diffusers, ".unet, .vae"),
    "int": (lambda: 7, "nn.Module"),
    "float": (lambda: 0.5, "nn.Module"),
    "bytes": (lambda: b"model", "nn.Module"),
    "tensor": (lambda: X, "nn.Module"),
    "parameter": (lambda: nn.Parameter(X), "nn.Module"),
    "function": (lambda: torch.relu, "nn.Module"),
    "bound forward": (lambda: mlp().forward, "nn.Module"),
    "optimizer": (lambda: torch.optim.SGD(mlp().parameters()), "nn.Module"),
    "configuration": (lambda: transformers.BertConfig(), "nn.Module"),
    "file of bytes": (lambda: io.BytesIO(b"model"), "nn.Module"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("inputs", [(X,), None], ids=["with inputs", "without"])
def test_it_is_refused_with_what_to_give(name, inputs):
    make, hint = WRONG[name]
    with pytest.raises(UsageError) as caught:
        fxc.optimize(make(), inputs, "int8")
    assert caught.value.hint and hint in str(caught.value), caught.value
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("source", ["", ".", "no/such/model/at/all", "/nowhere", "a" * 5000, "a\0b", pathlib.Path("nowhere")])
def test_a_text_that_names_no_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FxcError) as caught:
        fxc.optimize(source, (X,))
    assert caught.value.hint and len(str(caught.value)) < 8000


def test_looking_at_a_model_changes_nothing():
    model = mlp().train()
    model[0].eval()
    fxc.optimize(model, (X,), "int8")
    assert [m.training for m in model.modules()] == [True, False, True, True]


def test_a_lazy_module_that_was_called_is_a_model():
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU()).eval()
    model(X)
    assert torch.allclose(fxc.optimize(model, (X,), "")(X), model(X), atol=1e-6)


def test_a_compiled_model_is_not_compiled_again():
    compiled = fxc.optimize(mlp(), (X,), "int8")
    for given in (compiled, nn.Sequential(compiled, nn.ReLU()), torch.compile(mlp(), backend="eager")):
        try:
            again = fxc.optimize(given, (X,), "")
        except UsageError as error:
            assert error.hint
        else:
            # Captured are a program's operators, which may round otherwise than this machine's kernels.
            assert (again(X) - given(X)).abs().max() <= 0.02 * given(X).abs().max()


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a\0b"])
def test_names_that_no_folder_has_are_said(name):
    with pytest.raises(FxcError):
        fxc.optimize(name, passes="int8")
