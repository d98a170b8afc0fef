"""Calibration data: what becomes of texts, rows, images and tensors, what is said of data that a model cannot take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from families import build
from tiny import byte_tokenizer, save
from typer.testing import CliRunner

import fxc
from fxc.cli.app import app
from fxc.data.calibration import calibration_samples, check_data, plain_pixels
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.measure.evaluate import encode, tokenizer_of
from fxc.passes.base import Pass, Result
from fxc.source.load import load_source

TEXT = "def answer(question):\n    return 42 if question else None\n\n" * 40


@pytest.fixture(scope="module")
def programs():
    """Family -> its program, captured once."""
    made: dict[str, fxc.Program] = {}

    def program(name: str) -> fxc.Program:
        if name not in made:
            made[name] = capture(*build(name), check=False)
        return made[name]

    return program


@pytest.fixture(scope="module")
def pylm(pylm_dir):
    return capture(load_source(str(pylm_dir)).model, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte tokenizer (token = byte's place + 3), a text, rows, and pictures."""
    root = tmp_path_factory.mktemp("calibration")
    byte_tokenizer().save_pretrained(root)
    (root / "text.txt").write_text(TEXT)
    (root / "rows.jsonl").write_text('{"text": "hello", "id": 7}\n\n{"text": " "}\n{"input_ids": [3, 4, 5]}\n')
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional")
    root = tmp_path_factory.mktemp("pictures")
    (root / "cats").mkdir()
    numbers = np.random.default_rng(0)
    for name, mode in (("b.png", "RGB"), ("cats/a.jpg", "RGB"), ("c.webp", "RGBA"), ("d.PNG", "L")):
        shape = (40, 56) if mode == "L" else (40, 56, len(mode))
        image.fromarray(numbers.integers(0, 255, shape, dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("not a picture")
    return root


def runs(program, samples) -> None:
    for sample in samples:
        assert all(output.isfinite().all() for output in program.module()(*sample))


def refused(program, data, said: str, **options) -> str:
    with pytest.raises(UsageError) as caught:
        calibration_samples(program, data, **options)
    assert said in str(caught.value) and "try:" in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- texts


def test_a_decoder_gets_windows_from_all_over_the_text(pylm, pylm_dir):
    path = pylm_dir / "heldout.txt"
    samples = calibration_samples(pylm, path, folder=pylm_dir, limit=4, window=32)
    tokens = encode(tokenizer_of(pylm_dir), path.read_text(encoding="utf-8"))
    cut = tokens[: len(tokens) // 32 * 32].view(-1, 1, 32)
    assert [s[0].tolist() for s in samples] == [cut[i * len(cut) // 4].tolist() for i in range(4)]
    for ids, mask, positions, *past in samples:
        assert mask.tolist() == [[1] * 32] and positions.tolist() == [list(range(32))] and ids.dtype == torch.int64
        assert {tuple(t.shape) for t in past} == {(1, 4, 0, 32)} and len(past) == 10
    again = calibration_samples(pylm, str(path), folder=pylm_dir, limit=4, window=32)
    assert all(torch.equal(a, b) for one, other in zip(samples, again) for a, b in zip(one, other))
    runs(pylm, samples[:1])


def test_an_encoder_gets_windows_with_its_tokenizers_tokens_around_them(minilm_dir, folder):
    program = capture(load_source(str(minilm_dir)).model, check=False)
    samples = calibration_samples(program, folder / "text.txt", folder=minilm_dir, limit=3, window=16)
    tokenizer = tokenizer_of(minilm_dir)
    for ids, mask, *kinds in samples:
        assert ids.shape == (1, 16) and ids[0, 0] == tokenizer.cls_token_id and ids[0, -1] == tokenizer.sep_token_id
        assert mask.all() and not any(k.any() for k in kinds)
    runs(program, samples[:1])


def test_windows_fit_the_model_and_a_short_text_is_one_sample(programs, folder, tmp_path):
    program, config = programs("bert"), build("bert")[0].config
    samples = calibration_samples(program, folder / "text.txt", folder=folder, config=config, window=4096)
    assert {s[0].shape[1] for s in samples} == {128} and len(samples) == len(TEXT) // 128
    (tmp_path / "short.md").write_text("abc")
    ((ids, *_),) = calibration_samples(program, tmp_path / "short.md", folder=folder)
    assert ids.shape == (1, 3)


def test_texts_and_rows(programs, folder):
    program = programs("qwen2")
    samples = calibration_samples(program, folder / "rows.jsonl", folder=folder)
    assert [s[0].shape[1] for s in samples] == [5, 3] and samples[1][0].tolist() == [[3, 4, 5]]
    texts = calibration_samples(program, ["hello", {"text": "a" * 99}], folder=folder, window=8)
    assert torch.equal(texts[0][0], samples[0][0]) and texts[1][0].shape == (1, 8)
    runs(program, samples)
    assert len(calibration_samples(program, folder / "rows.jsonl", folder=folder, limit=1)) == 1


def test_the_tokenizer_is_found_where_the_model_came_from(programs, folder):
    config = build("qwen2")[0].config
    refused(programs("qwen2"), folder / "text.txt", "came without its tokenizer", config=config)
    config.name_or_path = str(folder)
    assert calibration_samples(programs("qwen2"), folder / "text.txt", config=config)


# ----------------------------------------------------------------------------------------------------------- any inputs


def test_rows_of_numbers_are_inputs_by_name(programs, tmp_path):
    rows = [{"x": [0.5] * 40}, {"x": [list(range(40))] * 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = calibration_samples(programs("mlp"), tmp_path / "x.jsonl")
    assert [(tuple(s[0].shape), s[0].dtype) for s in samples] == [((1, 40), torch.float32), ((3, 40), torch.float32)]
    runs(programs("mlp"), samples)
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "token_type_ids": [0, 0, 0]}
    for name in ("bert", "distilbert"):
        (sample,) = calibration_samples(programs(name), [row])
        assert [t.tolist() for t in sample] == [[v] for v in row.values()][: len(sample)]


def test_tensors_tuples_dicts_and_batches_are_kept(programs):
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    for data in ([x], [(x,)], [{"x": x}], x, {"x": x}, (each for each in [x]), [x.detach().numpy()], x.detach().numpy()):
        ((found,),) = calibration_samples(programs("mlp"), data)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), x) and not found.requires_grad
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(6, 40)), batch_size=2)
    assert [s[0].shape[0] for s in calibration_samples(programs("mlp"), loader)] == [2, 2, 2]
    assert len(calibration_samples(programs("mlp"), iter(lambda: x, None), limit=3)) == 3
    clip = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "pixel_values": torch.zeros(2, 3, 32, 32)}
    ((ids, mask, pixels),) = calibration_samples(programs("clip"), [clip])
    assert mask.all() and ids.shape == (2, 4) and pixels.shape == (2, 3, 32, 32)


def test_a_decoders_mask_positions_and_cache_are_filled_in(programs):
    program = programs("qwen2")
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "token_type_ids": ids * 0}
    for data in (ids, [ids], [(ids,)], [{"input_ids": ids}], [padded], [ids.tolist()]):
        (sample,) = calibration_samples(program, data)
        assert torch.equal(sample[0], ids) and sample[2].tolist() == [[0, 1, 2, 3]] * 2
        assert torch.equal(sample[1], padded["attention_mask"] if data == [padded] else torch.ones_like(ids))
        assert sample[3].shape == (2, 2, 0, 16)
    runs(program, calibration_samples(program, [padded]))
    (whole,) = calibration_samples(program, [dict(zip((i.name for i in program.signature.inputs), sample))])
    assert len(whole) == len(sample)


# --------------------------------------------------------------------------------------------------------------- images


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


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["a.json", "a.CSV", "a.parquet", "a.pt", "a.png", "a.zip", "none.txt", "empty"])
def test_data_of_the_wrong_kind_is_refused_without_a_model(tmp_path, name):
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "none.txt":
        (tmp_path / name).write_text("x")
    with pytest.raises(UsageError) as caught:
        check_data(tmp_path / name)
    assert caught.value.hint and name in str(caught.value)
    with pytest.raises(UsageError, match="int"):
        check_data(7)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("\n  \n", "empty"),
        ('{"text": ""}', "empty"),
        ('{"text": "a"}\n{"text": ', ":2"),
        ("[1, 2]", "not a JSON object"),
        ('{"text": 3}', '"text" is of the type int'),
        ('{"input_ids": [1, 320]}', "holds 320, and the model knows 0 to 319"),
        ('{"input_ids": [1, -100]}', "holds -100"),
        ('{"input_ids": []}', "empty"),
        ('{"input_ids": [[1, 2], [3]]}', "does not make a tensor"),
        ('{"input_ids": [1.5]}', "must be torch.int64"),
        ('{"input_ids": "abc"}', "must be a tensor"),
        ('{"tokens": [1]}', "input_ids"),
        ('{"input_ids": [1, 2], "labels": [1]}', "'labels'"),
    ],
)
def test_wrong_rows(programs, folder, tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    for name in ("bert", "qwen2"):
        assert "rows.jsonl" in refused(programs(name), path, said, folder=folder)


def test_other_mistakes(programs, folder, tmp_path):
    bert, qwen2, mlp = map(programs, ("bert", "qwen2", "mlp"))
    text = folder / "text.txt"
    refused(bert, text, "tokenizer", folder=tmp_path)
    assert "images" in refused(programs("vit"), text, "does not read text")
    assert ".jsonl" in refused(mlp, text, "does not read text")
    assert "iterable of dicts" in refused(programs("clip"), text, "pixel_values too", folder=folder)
    refused(programs("t5"), ["a text"], "decoder_input_ids too", folder=folder)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(bert, tmp_path / "latin.txt", "cannot be read", folder=folder)
    (tmp_path / "nothing.txt").write_text("")
    refused(qwen2, tmp_path / "nothing.txt", "empty", folder=folder)
    byte_tokenizer(320).save_pretrained(tmp_path)
    assert "sample 2" in refused(mlp, [torch.zeros(1, 40), torch.zeros(1, 41)], "captured for 40")
    refused(mlp, [torch.zeros(40)], "dimensions")
    refused(mlp, [torch.full((1, 40), float("nan"))], "NaN")
    refused(mlp, [(torch.zeros(1, 40), torch.zeros(1))], "2 positional arguments")
    refused(mlp, [None], "cannot be of the type NoneType")
    refused(mlp, [], "empty")
    refused(mlp, [torch.zeros(1, 40)], "at least one sample", limit=0)
    ids = torch.ones(1, 200, dtype=torch.int64)
    refused(bert, [ids], "at most 128", config=build("bert")[0].config)
    refused(qwen2, [{"input_ids": ids, "attention_mask": ids[:, :5]}], "attention_mask is [1, 5]")
    refused(qwen2, [{"attention_mask": ids}], "missing")
    refused(qwen2, [ids[0]], "input_ids has 1 dimensions")
    refused(qwen2, [{"input_ids": ids, "past.0.key": torch.zeros(1, 2, 3, 16)}], "missing")


# ------------------------------------------------------------------------------------------- what passes are given of it


@pytest.fixture
def learner(monkeypatch):
    """A pass that uses data, and the contexts that it was given."""
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))
    seen = []

    @dataclass(frozen=True)
    class Learner(Pass):
        name: ClassVar[str] = "learner"
        learn: bool = True

        def uses_data(self) -> bool:
            return self.learn

        def run(self, program, context) -> Result:
            seen.append(context)
            return Result()

    return seen


def test_passes_are_given_the_samples(learner, folder):
    model, inputs = build("mlp")
    data = [torch.randn(2, 40) for _ in range(3)]
    fxc.optimize(model, inputs, "learner", calib=data, verify=False)
    assert [s[0].shape for s in learner[0].samples] == [(2, 40)] * 3
    fxc.optimize(model, inputs, "learner", verify=False)
    assert learner[1].samples == []
    with pytest.raises(UsageError, match="no such calibration data"):
        fxc.optimize(model, inputs, "learner", calib="none.txt")


def test_the_command_line_reads_the_data_where_a_pass_uses_it(learner, folder, tmp_path):
    save("bert", tmp_path / "model")

    def compile_with(*options: object, code: int = 0) -> str:
        arguments = ["compile", tmp_path / "model", "--no-verify", "--passes", *options]
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        return done.stderr

    said = compile_with("learner", "-o", tmp_path / "a", "--calib", folder / "text.txt")
    assert "reading calibration samples ..." in said and "no pass of this recipe" not in said
    assert learner[0].samples[0][0].shape == (1, 128)
    said = compile_with("learner:learn=false", "-o", tmp_path / "b", "--calib", folder / "text.txt")
    assert "no pass of this recipe uses calibration data" in said and learner[1].samples == []
    for name in ("none.txt", "model"):
        said = compile_with("learner", "-o", tmp_path / "c", "--calib", tmp_path / name, code=2)
        assert said.startswith("error[FXC-E2]") and not (tmp_path / "c").exists()
