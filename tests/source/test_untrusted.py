"""Code, pickles, kernels, names and links in a folder: none runs, none leads out."""

import json
import os
import pickle

import pytest
import torch
from checkpoints import INDEX, edit_json, refusal, shards
from safetensors.torch import load_file

from fxc.source.load import load_source


@pytest.mark.fault(24)
def test_auto_map_needs_trust_and_does_not_run(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Evil\n")
    edit_json(single / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil"}))
    refusal(single, "config.json", "auto_map", "evil.Evil", "trust_remote_code")
    assert not marker.exists()
    edit_json(single / "config.json", lambda c: c.update(nested={"auto_map": c.pop("auto_map")}))
    refusal(single, "nested.auto_map")


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "sdpa"),
        ("_experts_implementation_internal", "eager"),
        ("_attn_implementation", "someone/evil-kernel"),
        ("attn_implementation", "paged|kernels-community/x:fn"),
        ("attn_implementation", {"text_config": "someone/evil"}),
    ],
)
def test_hub_kernels_named_by_a_config(single, key, value):
    edit_json(single / "config.json", lambda config: config.update({key: value}))
    refusal(single, "config.json", f"{key} = {value}", f"remove {key}")
    edit_json(single / "config.json", lambda config: config.update(text_config=[{key: config.pop(key)}]))
    refusal(single, f"text_config.0.{key}")


@pytest.mark.fault(10)
def test_quantized_already(single):
    edit_json(single / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refusal(single, "already quantized (gptq, 4 bits)", "config.json", "start from the model it was made from")


def test_weights_file_named_by_the_config(single):
    edit_json(single / "config.json", lambda c: c.update(transformers_weights="other.safetensors"))
    refusal(single, "other.safetensors", "redirects")


def test_adapter_folder(single):
    (single / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    refusal(single, "PEFT adapter", "merge")


class Evil:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault(23)
def test_pickles_never_run(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker), protocol=2))
    refusal(single, "pickle", "pytorch_model.bin", "allow_pickle")
    refusal(single, "could run code", "pytorch_model.bin", allow_pickle=True)
    torch.save({"lm_head.weight": Evil(marker)}, single / "pytorch_model.bin")
    refusal(single, "could run code", "pytorch_model.bin", allow_pickle=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the pickle would have run"


def test_an_honest_pickle_loads_when_it_is_allowed(single):
    weights = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    torch.save(weights, single / "pytorch_model.bin")
    loaded = load_source(str(single), allow_pickle=True)
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], weights["lm_head.weight"])
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.fault(23)
def test_safetensors_win_over_a_pickle_beside_them(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    load_source(str(single), allow_pickle=True)
    assert not marker.exists()


LEADING_OUT = [
    "../x.safetensors",
    "a/../../x.safetensors",
    "/etc/x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\server\\x.safetensors",
    "..\\x.safetensors",
    "//server/x.safetensors",
    "x\0.safetensors",
    "..",
    "",
    None,
    7,
]


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", LEADING_OUT)
def test_index_that_leads_out(sharded, name):
    def redirect(index):
        index["weight_map"]["lm_head.weight"] = name

    edit_json(sharded / INDEX, redirect)
    refusal(sharded, INDEX, "leads out of the model's folder", "do not use")


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_that_lead_out(single, tmp_path, name):
    (single / name).unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (single / name).symlink_to(secret)
    refusal(single, single / name, "a link that leads out", secret)


def test_a_linked_directory_inside_an_index(sharded, tmp_path):
    (tmp_path / "outside").mkdir()
    shards(sharded)[0].rename(tmp_path / "outside" / "a.safetensors")
    (sharded / "inside").symlink_to(tmp_path / "outside")

    def redirect(index):
        gone = "model-00001"
        index["weight_map"] = {k: "inside/a.safetensors" if gone in v else v for k, v in index["weight_map"].items()}

    edit_json(sharded / INDEX, redirect)
    refusal(sharded, "inside/a.safetensors", "a link that leads out")


def test_links_inside_the_folder_and_a_linked_folder_pass(single, tmp_path):
    (single / "model.safetensors").rename(single / "real")
    (single / "model.safetensors").symlink_to("real")
    (tmp_path / "link").symlink_to(single)
    load_source(str(tmp_path / "link"))


@pytest.mark.fault(23)
def test_a_pickle_in_a_safetensors_index(sharded):
    (sharded / "x.bin").write_bytes(b"")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "x.bin"}))
    refusal(sharded, INDEX, "not .safetensors", "x.bin")
