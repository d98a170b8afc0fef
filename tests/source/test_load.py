"""Sources load: folders, functions, and which kind is which."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, edit_json, refusal
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from fxc.errors import UsageError
from fxc.source.load import kind_of, load_source


def test_minilm_loads(minilm_dir):
    loaded = load_source(str(minilm_dir))
    assert type(loaded.model).__name__ == "BertModel"
    assert loaded.tokenizer_dir == minilm_dir and loaded.example_inputs is None
    assert loaded.source["kind"] == "folder" and loaded.source["dtype"] == "float32"
    assert loaded.source["files"]["model.safetensors"]["size"] == (minilm_dir / "model.safetensors").stat().st_size
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    stored = load_file(minilm_dir / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["encoder.layer.5.output.dense.weight"],
                       stored["encoder.layer.5.output.dense.weight"])  # fmt: skip
    json.dumps(loaded.source)


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_auto_keeps_the_stored_dtype(saved, name):
    loaded = load_source(str(saved / name))
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_auto_believes_the_weights_and_not_the_config(single):
    edit_json(single / "config.json", lambda config: config.update(dtype="float16"))
    assert load_source(str(single)).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.float32])
def test_dtype_can_be_chosen(saved, dtype):
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert load_source(str(saved / "single"), dtype=dtype).model.dtype == expected


def test_unknown_dtype(saved):
    refusal(saved / "single", "unknown dtype 'int8'", "bfloat16", error=UsageError, dtype="int8")


@pytest.mark.fault(1)
def test_tied_weights_are_not_missing(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_source(str(tmp_path)).model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_without_architectures_the_base_model_is_taken(tmp_path):
    BertModel(BertConfig(vocab_size=32, **SMALL)).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.pop("architectures"))
    assert isinstance(load_source(str(tmp_path)).model, BertModel)


def test_subfolder(single):
    loaded = load_source(str(single.parent), subfolder="single")
    assert loaded.tokenizer_dir == single and loaded.source["subfolder"] == "single"
    refusal(single.parent, "../single", subfolder="../single")


@pytest.mark.fault(24)
def test_hub_kernels_are_off_while_loading_and_only_then(single, monkeypatch):
    from transformers.integrations import hub_kernels

    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    seen = []
    original = LlamaForCausalLM.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        seen.append(
            (
                os.environ["USE_HUB_KERNELS"],
                hub_kernels._kernels_enabled,
                kwargs["trust_remote_code"],
                kwargs["weights_only"],
            )
        )
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(spy))
    load_source(str(single))
    assert seen == [("0", False, False, True)]
    assert "USE_HUB_KERNELS" not in os.environ and hub_kernels._kernels_enabled


def test_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "artifact"):
        Path(name).mkdir(parents=True)
    Path("artifact/fxc.json").write_text("{}")
    kinds = {"org/model": "folder", "artifact": "artifact", "org/other": "hub", "gpt2": "hub", "a.b:make": "factory"}
    assert {source: kind_of(source) for source in kinds} == kinds
    refusal("artifact", "artifact", "fxc.load", error=UsageError)
    refusal("./absent", "./absent: no such model", error=UsageError)
    refusal("artifact/fxc.json", "this is a file", error=UsageError)
    refusal("org/model", "--revision", error=UsageError, revision="main")
    refusal("org/model", "org/model", "config.json")


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "shop_for_models.py").write_text(
        "import torch\n"
        "def plain(): return torch.nn.Linear(4, 2).train()\n"
        "def pair(): return torch.nn.Linear(4, 2), (torch.ones(1, 4),)\n"
        "def nothing(): return None\n"
        "def sick(): return torch.nn.Linear(4, 2, bias=False).apply(lambda m: m.weight.data.fill_(float('nan')))\n"
        "def broken(): raise KeyError('no \\x1b[31mred\\x1b[0m weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "shop_for_models"
    sys.modules.pop("shop_for_models", None)


def test_factory(module):
    path = list(sys.path)
    loaded = load_source(f"{module}:plain", dtype="bfloat16")
    assert loaded.model.weight.dtype == torch.bfloat16 and not loaded.model.training and loaded.example_inputs is None
    assert loaded.source == {"kind": "factory", "id": f"{module}:plain"} and loaded.tokenizer_dir is None
    inputs = load_source(f"{module}:pair").example_inputs
    assert isinstance(inputs, tuple) and inputs[0].shape == (1, 4)
    assert sys.path == path


def test_factory_faults(module):
    refusal(f"{module}:nothing", "did not return a model", "NoneType", error=UsageError)
    refusal(f"{module}:absent", "no attribute 'absent'", error=UsageError)
    refusal("no_such_package.x:f", "No module named 'no_such_package'", error=UsageError)
    assert "\x1b" not in refusal(f"{module}:broken", "KeyError: 'no", "weights", error=UsageError)
    refusal(f"{module}:sick", "weight (8 NaN, 0 Inf of 8)")
