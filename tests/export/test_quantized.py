"""Folders of packed weights, which transformers loads where fxc is imported: numbers as they are, outputs and tokens alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from command import fxc_json
from families import build
from repo import REPO
from safetensors.torch import load_file
from tiny import byte_tokenizer
from transformers import AutoModel, AutoModelForCausalLM

import fxc
from fxc.errors import UsageError

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
LOOSE = {"budget": 9, "layer_budget": 9}
FORMATS = ["int8", "int8:mode=weight_only", "int4:group=32", "int4:bits=3:group=32", "fp8", "sparse24"]


@pytest.fixture(scope="module")
def qwen():
    return build("qwen2")[0]


@pytest.mark.parametrize("passes", FORMATS)
def test_every_format_of_linear_layers_loads_and_agrees(passes, qwen, tmp_path):
    compiled = fxc.optimize(qwen, passes=passes, verify=False)
    made = compiled.export_fxc(tmp_path / "out")
    assert made.model_class == "Qwen2ForCausalLM" and made.zeros == []
    says = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert says["quant_method"] == "fxc" and "model.layers.0.mlp.up_proj" in says["layers"]
    stored, constants = load_file(tmp_path / "out" / "model.safetensors"), compiled.program.constants
    layer = "model.layers.1.self_attn.k_proj"
    for part in says["layers"][layer]["parts"]:
        assert torch.equal(stored[f"{layer}.{part}"].view(torch.uint8), constants[f"{layer}.{part}"].view(torch.uint8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, expected = loaded(IDS).logits, compiled(IDS).logits
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_it_generates_in_bfloat16_and_saves_itself(qwen, tmp_path):
    compiled = fxc.optimize(qwen, passes="int8", dtype="bfloat16", tokenizer=byte_tokenizer(), **LOOSE)
    compiled.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = loaded.model.layers[0].mlp.up_proj
    assert loaded.dtype == torch.bfloat16 and (layer.qweight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False}
    first = loaded.generate(IDS, **options)
    assert torch.equal(first[:, :10], compiled.generate(IDS, **options)[:, :10])
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(IDS, **options), first)


def test_scales_of_two_bytes_are_taken_in_whatever_the_model_is_loaded_in(qwen, tmp_path):
    compiled = fxc.optimize(qwen, passes="int4:group=32", dtype="bfloat16", **LOOSE)
    compiled.export_fxc(tmp_path / "out")
    expected = compiled(IDS).logits.float()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        assert loaded.model.layers[0].mlp.up_proj.scale.dtype == torch.bfloat16
        with torch.no_grad():
            found = loaded(IDS).logits
        assert found.dtype == dtype and (found.float() - expected).norm() < 0.05 * expected.norm()


def test_an_encoder_and_a_mixture_of_formats(tmp_path, minilm_dir):
    compiled = fxc.optimize(minilm_dir, passes="int4:only='re:intermediate':group=32,int8")
    compiled.export_fxc(tmp_path / "out", max_shard_bytes=8_000_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert {type(m).__name__ for m in loaded.encoder.layer[0].intermediate.children()} >= {"PackedLinear"}
    with torch.no_grad():
        found, expected = (each(input_ids=IDS).last_hidden_state for each in (loaded, compiled))
    # The compiled model's attention may be in bfloat16, which moves activations to other levels.
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_a_pruned_model_has_the_configuration_that_it_is_now(qwen, tmp_path):
    compiled = fxc.optimize(qwen, passes="int8,prune:ffn=0.25:uniform=true", **LOOSE)
    compiled.export_fxc(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size < qwen.config.intermediate_size


def test_a_model_with_nothing_packed_is_refused(qwen, tmp_path):
    with pytest.raises(UsageError, match="nothing in it is quantized"):
        fxc.optimize(qwen, passes="", verify=False).export_fxc(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fresh_process_needs_only_the_import(qwen, tmp_path):
    fxc.optimize(qwen, passes="int8", verify=False).save(tmp_path / "artifact")
    told = fxc_json("export", tmp_path / "artifact", "--format", "fxc", "-o", tmp_path / "out")
    assert told["format"] == "fxc" and told["class"] == "Qwen2ForCausalLM"
    lines = ["import fxc, sys", "assert 'transformers' not in sys.modules", "from transformers import AutoModelForCausalLM",
             f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})",
             "print(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__name__)"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Qwen2ForCausalLM PackedLinear\n"
