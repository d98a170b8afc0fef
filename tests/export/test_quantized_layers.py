"""Packed tables, experts and convolutions in folders of transformers: loaded, run, saved and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families import _auto, _causal, build
from safetensors.torch import load_file
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.quantizer.layers import PackedConv2d, PackedEmbedding, PackedExperts, PackedLinear, PackedRows

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT, BOTH, IMAGES = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, {"pixel_values": PIXELS}


def bart(positions=64):
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    sizes["max_position_embeddings"] = positions
    return _auto("AutoModelForSeq2SeqLM", "BartConfig", vocab_size=320, d_model=64, scale_embedding=True, **sizes).eval()


def gemma3():
    return _causal("Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True).eval()


def convnext():
    sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32, "num_labels": 40}
    return _auto("AutoModelForImageClassification", "ConvNextConfig", **sizes).eval()


# Model, passes, inputs, layers of transformers -> what stands there.
CASES = {
    "a table": (lambda: build("qwen2")[0], "int8:embeddings=int8", TEXT, {"model.embed_tokens": PackedEmbedding}),
    "a table of int4 and a tied head": (
        lambda: _causal("Qwen2Config", tie_word_embeddings=True).eval(), "int4:group=32:embeddings=int4", TEXT,
        {"model.embed_tokens": PackedEmbedding, "lm_head": PackedLinear}),
    "a table whose rows are scaled": (gemma3, "int8:embeddings=int8", TEXT, {"model.embed_tokens": PackedEmbedding}),
    "a table that three read": (bart, "int8:embeddings=int8", BOTH, {"model.decoder.embed_tokens": PackedEmbedding}),
    "a table that four read": (lambda: build("t5")[0], "int8:embeddings=int8", BOTH, {"encoder.embed_tokens": PackedEmbedding}),
    "GPT-2's linear layers": (lambda: build("gpt2")[0], "int4:group=32", TEXT, {"transformer.h.0.mlp.c_fc": PackedLinear}),
    "experts": (lambda: build("mixtral")[0], "int8", TEXT, {"model.layers.0.mlp.experts.gate_up_proj": PackedRows}),
    "some experts": (lambda: build("qwen3_moe")[0], "int8:only='*.experts.down_proj'", TEXT,
                     {"model.layers.1.mlp.experts": PackedExperts, "model.layers.1.mlp.experts.down_proj": PackedRows}),
    "a convolution": (lambda: build("vit")[0], "int8:mode=static", IMAGES,
                      {"vit.embeddings.patch_embeddings.projection": PackedConv2d}),
    "convolutions that batch norms went into": (
        lambda: build("resnet")[0], "int8:mode=static", IMAGES,
        {"resnet.embedder.embedder.convolution": PackedConv2d, "resnet.embedder.embedder.normalization": nn.Identity}),
    "convolutions by channel": (convnext, "int8:mode=static", IMAGES,
                                {"convnext.encoder.stages.0.layers.0.dwconv": PackedConv2d}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_loads_runs_and_saves_itself(name, tmp_path):
    make, passes, inputs, layers = CASES[name]
    model = make()
    calib = {"calib": [{"pixel_values": PIXELS.roll(n, 3)} for n in range(4)]} if "static" in passes else {}
    compiled = fxc.optimize(model, passes=passes, verify=False, **calib)
    compiled.export_fxc(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert {layer: type(loaded.get_submodule(layer)) for layer in layers} == layers
    with torch.no_grad():
        found, expected = loaded(**inputs).logits, compiled(**inputs).logits
    # Nothing but the forms of linear layers, which each chooses by time, tells them apart.
    assert (found - expected).norm() < 0.02 * expected.norm()
    loaded.tie_weights()  # which lm-eval calls
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    says = [json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"] for folder in ("out", "again")]
    assert says[0] == says[1]
    again = type(model).from_pretrained(tmp_path / "again")
    assert {key: value.dtype for key, value in again.state_dict().items()} == {
        key: value.dtype for key, value in loaded.state_dict().items()
    }


def test_a_layer_whose_place_nothing_takes_is_refused_by_name(tmp_path):
    compiled = fxc.optimize(bart(positions=512), passes="int8:embeddings=int8", verify=False)
    with pytest.raises(UsageError, match="embed_positions") as refusal:
        compiled.export_fxc(tmp_path / "out")
    assert "a BartLearnedPositionalEmbedding there" in refusal.value.why and not (tmp_path / "out").exists()


def test_a_tied_head_has_the_tables_numbers_wherever_they_go(tmp_path):
    model = _causal("Qwen2Config", tie_word_embeddings=True).eval()
    fxc.optimize(model, passes="int8:embeddings=int8", verify=False).export_fxc(tmp_path / "out")
    assert not [key for key in load_file(tmp_path / "out" / "model.safetensors") if key.startswith("lm_head")]
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    table, head = loaded.model.embed_tokens, loaded.lm_head
    assert table(IDS).dtype == torch.bfloat16 and head.part("qweight") is table.qweight
    before = loaded(IDS).logits
    loaded.load_state_dict(loaded.state_dict() | {"model.embed_tokens.scale": table.scale * 2})
    after = loaded(IDS).logits
    assert (after - before).norm() > 0.5 * before.norm()
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 13)
    assert table.to(torch.float32)(IDS).dtype == torch.float32 and table.qweight.dtype == torch.int8


def test_experts_are_taken_by_their_config_too(tmp_path):
    """Whatever implementation of experts is asked for, packed ones run as they do."""
    compiled = fxc.optimize(build("mixtral")[0], passes="int8", verify=False)
    compiled.export_fxc(tmp_path / "out")
    outputs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation=way)(IDS).logits
               for way in ("eager", "grouped_mm")]  # fmt: skip
    assert torch.allclose(*outputs, atol=1e-4)
