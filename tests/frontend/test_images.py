"""The sizes of images and sounds that Hugging Face models are captured for, and those that they take afterwards."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import fxc
from fxc.frontend.images import image_size


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 224, "width": 192}}, (224, 192)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, 224)),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, (256, 256)),
        ({"image_processor": {"size": 96}}, (96, 96)),
        ({}, (64, 64)),
    ],
)
def test_the_processor_says_the_size_where_the_model_does_not(tmp_path, settings, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert image_size(SimpleNamespace(name_or_path=str(tmp_path))) == size
    assert image_size(SimpleNamespace(name_or_path=str(tmp_path), image_size=32)) == (32, 32)
    assert image_size(SimpleNamespace(name_or_path="")) == (64, 64)


def test_a_convolutional_network_takes_images_of_other_sizes():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=5)
    model = transformers.ResNetForImageClassification(config).eval()
    compiled = fxc.optimize(model, passes="")
    for shape in ((1, 3, 64, 64), (2, 3, 96, 128), (3, 3, 224, 160)):
        pixels = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


def test_waves_of_any_length():
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 8),
        conv_kernel=(10, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        vocab_size=32,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config).eval()
    compiled = fxc.optimize(model, passes="int8")
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight" in compiled.program.constants
    for samples in (4000, 6001):
        wave = torch.randn(2, samples)
        with torch.no_grad():
            expected = model(wave).logits
        assert (compiled(wave).logits - expected).norm() < 0.1 * expected.norm()


def test_spectrograms_from_the_configuration():
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_length=64, num_mel_bins=32
    )
    model = transformers.ASTForAudioClassification(config).eval()
    compiled = fxc.optimize(model, passes="")
    sounds = torch.randn(3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(sounds).logits, model(sounds).logits)
