"""Models of several parts: a language model that reads images is refused whole and compiled by part, and the report says so."""

import functools

import pytest
import torch
import transformers
from torch import nn

import fxc
from fxc.errors import CaptureFailed, UsageError

TEXT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(10, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config=dict(TEXT, rope_parameters=rope),
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


@functools.cache
def built(make):
    torch.manual_seed(0)
    return make().eval()


def nbytes(module, buffers=False):
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *(module.buffers() if buffers else ())])


@pytest.mark.parametrize("make", [llava, pytest.param(qwen2_vl, marks=pytest.mark.slow)], ids=lambda make: make.__name__)
def test_the_whole_is_refused_with_what_to_do(make):
    with pytest.raises(CaptureFailed) as caught:
        fxc.optimize(built(make), passes="int8")
    assert "--part language_model" in caught.value.hint and "model.vis" in caught.value.why


@pytest.mark.parametrize("make", [pytest.param(llava, marks=pytest.mark.slow), qwen2_vl], ids=lambda make: make.__name__)
def test_the_language_model_alone(make, tmp_path):
    model = built(make)
    compiled = fxc.optimize(model, passes="", part="language_model")
    weights = sum(nbytes(part) for part in (model.model.language_model, model.lm_head))
    rotary = sum(nbytes(part, buffers=True) for part in (model.model.language_model, model.lm_head)) - weights
    assert weights <= compiled.report["bytes_before"] <= weights + rotary
    assert compiled.report["source"]["part"] == "language_model"
    compiled.save(tmp_path / "a")
    loaded = fxc.load(tmp_path / "a")
    assert loaded.report["source"]["part"] == "language_model"
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert torch.equal(compiled.generate(IDS, **options), expected)
    assert torch.equal(loaded.generate(IDS, **options), expected)


@pytest.mark.parametrize("part", ["model.vision_tower", "vision_tower"])
def test_the_tower(part):
    model, pixels = built(llava), torch.randn(2, 3, 32, 32)
    compiled = fxc.optimize(model, {"pixel_values": pixels}, "int8", part=part)
    assert compiled.report["source"] == {"kind": "module", "class": "CLIPVisionModel", "part": "model.vision_tower"}
    assert compiled.report["bytes_before"] <= nbytes(model.model.vision_tower, buffers=True)
    expected = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    found = compiled(pixel_values=pixels).last_hidden_state
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_the_part_of_a_checkpoint(tmp_path):
    built(llava).save_pretrained(tmp_path / "m")
    compiled = fxc.optimize(tmp_path / "m", passes="int8", part="language_model")
    assert compiled.report["source"]["part"] == "language_model"
    assert compiled.report["bytes_before"] < nbytes(built(llava))
    compiled.save(tmp_path / "a")
    with pytest.raises(UsageError, match="whole"):
        fxc.optimize(tmp_path / "a", part="language_model")


@pytest.mark.parametrize(
    "part, hint", [("model.vision_towr", "model.vision_tower"), ("", "named_modules"), (" ", ""), (3, ""), ("model.*", "model")]
)
def test_a_part_that_is_not_there(part, hint):
    with pytest.raises(UsageError) as caught:
        fxc.optimize(built(llava), passes="int8", part=part)
    assert caught.value.hint and hint in caught.value.hint


def test_a_part_of_a_plain_module():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.ReLU(), nn.Linear(64, 8))).eval(), torch.randn(3, 64)
    compiled = fxc.optimize(model, (x,), "", part="1")
    assert torch.allclose(compiled(x), model[1](x), atol=1e-6) and compiled.report["bytes_before"] == 4 * (64 * 8 + 8)
    assert "part" not in fxc.optimize(model, (x,), "").report["source"]
    with pytest.raises(UsageError):
        fxc.optimize(model, (x,), "", part="language_model")


def test_a_part_of_ones_own_model_may_be_trained_on_afterwards():
    model = torch.nn.Sequential()
    model.add_module("head", torch.nn.Linear(16, 16))
    x = torch.randn(3, 16)
    compiled = fxc.optimize(model.eval(), (x,), passes="", part="head")
    expected = compiled(x)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(compiled(x), expected)
