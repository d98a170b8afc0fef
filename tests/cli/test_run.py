"""`fxc run`: prompts, texts and images, and what it refuses."""

import shutil
import sys

import pytest
from command import fxc, fxc_json
from tiny import save


def test_run_continues_a_prompt(folder):
    made = fxc_json("run", folder / "qwen2-int8", "--prompt", "def f", "--max-new-tokens", "5")
    assert made["tokens"] == 5 and made["prompt"] == "def f" and sum(made["lowering"].values()) >= 15
    done = fxc("run", folder / "qwen2-int8", "--prompt", "def f", "--max-new-tokens", "5")
    assert done.stdout.startswith("def f") and "backend eager" in done.stderr


def test_run_reads_a_text(folder, minilm_dir, tmp_path):
    made = fxc_json("run", folder / "bert-int8", "--text", "hello")
    assert [row["label"] for row in made["top"]] in (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"])
    assert sum(row["probability"] for row in made["top"]) == pytest.approx(1)
    fxc("compile", minilm_dir, "-o", tmp_path / "out", "--passes", "int8", "--no-measure")
    made = fxc_json("run", tmp_path / "out", "--text", "A cat sits on the mat.")
    assert made["kind"] == "embedding" and made["size"] == 384 and len(made["first"]) == 8 and made["norm"] > 0
    assert "norm" in fxc("run", tmp_path / "out", "--text", "A cat").stdout


def test_run_looks_at_an_image(folder, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional")
    from transformers import ViTImageProcessor

    image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    assert "image processor" in fxc("run", folder / "vit-int8", "--image", tmp_path / "red.png", code=2).stderr
    shutil.copytree(folder / "vit", tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    fxc("compile", tmp_path / "vit", "-o", tmp_path / "out", "--no-measure")
    assert len(fxc_json("run", tmp_path / "out", "--image", tmp_path / "red.png")["top"]) == 2
    (tmp_path / "no.png").write_text("no image")
    assert "not an image" in fxc("run", tmp_path / "out", "--image", tmp_path / "no.png", code=2).stderr


def test_run_says_that_pillow_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in fxc("run", folder / "vit-int8", "--image", "x.png", code=2).stderr


def test_run_says_what_a_model_takes(folder):
    assert "--prompt" in fxc("run", folder / "qwen2-int8", "--text", "x", code=2).stderr
    assert "--text" in fxc("run", folder / "bert-int8", "--prompt", "x", code=2).stderr
    assert "--image" in fxc("run", folder / "vit-int8", "--prompt", "x", code=2).stderr
    fxc("run", folder / "bert-int8", code=2)
    fxc("run", folder / "bert", "--text", "x", code=2)
    fxc("run", folder / "bert-int8", "--text", "x", "--backend", "warp", code=2)


def test_run_refuses_a_damaged_artifact(folder, tmp_path):
    fxc("compile", folder / "bert", "-o", tmp_path / "out", "--no-measure")
    text = (tmp_path / "out" / "program.fxc").read_text()
    (tmp_path / "out" / "program.fxc").write_text(text[:-20])
    assert "program.fxc" in fxc("run", tmp_path / "out", "--text", "x", code=3).stderr


def test_run_writes_what_an_encoder_reads(tmp_path):
    save("t5", tmp_path / "t5", tokenizer=True)
    done = fxc("compile", tmp_path / "t5", "-o", tmp_path / "out", "--no-measure")
    assert "--prompt TEXT" in done.output and ".generate(input_ids" in done.output
    made = fxc_json("run", tmp_path / "out", "--prompt", "def f", "--max-new-tokens", "5")
    assert 0 < made["tokens"] <= 5 and made["prompt"] == "def f"
    printed = fxc("run", tmp_path / "out", "--prompt", "def f", "--max-new-tokens", "5").stdout
    assert not printed.startswith("def f") and made["text"].strip() in printed
    assert "--prompt" in fxc("run", tmp_path / "out", "--text", "x", code=2).stderr
