"""Images: what a model's image processor makes of them, with the library and without."""

import json

import numpy as np
import torch
from calibrated import refused, runs

from fxc.data.calibration import calibration_samples
from fxc.data.images import plain_pixels


def test_images_are_prepared_as_the_models_files_say(programs, pictures, tmp_path):
    from transformers import ViTImageProcessor

    program = programs("vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    samples = calibration_samples(program, pictures, folder=tmp_path)
    assert [tuple(s[0].shape) for s in samples] == [(1, 3, 32, 32)] * 4
    assert all(s[0].abs().max() <= 1 for s in samples)
    runs(program, samples)
    # Without the name of a class the file is read by fxc, to nearly the same numbers.
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for text in (json.dumps({k: v for k, v in settings.items() if k != "image_processor_type"}), "{}"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        plain = calibration_samples(program, pictures, folder=tmp_path)
        assert all(torch.allclose(a[0], b[0], atol=0.02) for a, b in zip(samples, plain))
    assert len(calibration_samples(program, pictures, folder=tmp_path, limit=2)) == 2


def test_plain_pixels_does_what_the_library_does(pictures):
    from PIL import Image
    from transformers import MobileNetV2ImageProcessorPil as Processor

    picture = Image.open(pictures / "b.png")
    options = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 28}, "image_mean": [0.1, 0.2, 0.3]}
    made = plain_pixels(options | {"image_std": [0.5, 0.6, 0.7]}, picture, 20, 28)
    expected = Processor(**options, image_std=[0.5, 0.6, 0.7])(images=picture, return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, expected, atol=1e-5)
    raw = plain_pixels({"do_resize": False, "do_rescale": False, "do_normalize": False}, picture.convert("L"), 1, 1)
    assert torch.equal(raw[0, 0], torch.from_numpy(np.array(picture.convert("L"))).float())


def test_images_that_cannot_be_used(programs, pictures, tmp_path):
    refused(programs("vit"), pictures, "image processor", folder=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 24}')
    assert "24" in refused(programs("vit"), pictures, "captured for 32", folder=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": "large"}')
    refused(programs("vit"), pictures, "cannot use this image", folder=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    assert "broken.png" in refused(programs("vit"), tmp_path, "not an image", folder=tmp_path)
    refused(programs("bert"), pictures, "does not take images")
    assert "iterable of dicts" in refused(programs("clip"), pictures, "input_ids too")


def test_images_need_pillow(programs, pictures, tmp_path, monkeypatch):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    refused(programs("vit"), pictures, "needs Pillow", folder=tmp_path)
