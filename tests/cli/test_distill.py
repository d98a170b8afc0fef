"""`fxc distill`: another model is taught, whose weights are fresh, its teacher's, or its own."""

import json

import pytest
from command import fxc, fxc_json
from tiny import byte_tokenizer

import fxc as package

FEW = ("--steps", "6", "--method", "all", "--data-length", "32")


@pytest.fixture(scope="module")
def small(folder):
    """A configuration without weights and without a tokenizer."""
    config = json.loads((folder / "qwen2" / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(config))
    return folder / "small"


def test_a_configuration_learns_and_takes_the_tokenizer_of_its_teacher(folder, small, tmp_path):
    out = tmp_path / "out"
    whole, text = folder / "qwen2", folder / "text.txt"
    done = fxc("distill", "--teacher", whole, "--student", small, "--data", text, "-o", out, *FEW, "--eval-text", text)
    assert f"taught by {whole}: 28," in done.stdout and "of its 127," in done.stdout and "perplexity" in done.stdout
    assert (out / "tokenizer.json").read_bytes() == (folder / "qwen2" / "tokenizer.json").read_bytes()
    report = json.loads((out / "fxc.json").read_text())["report"]
    assert report["source"] == {"kind": "configuration", "id": str(small), "class": "Qwen2ForCausalLM", "seed": 0}
    assert package.load(out).config.hidden_size == 32
    assert "2 tokens" in fxc("run", out, "--prompt", "def", "--max-new-tokens", "2").stderr


def test_layers_of_the_teacher_begin_with_its_weights(folder, tmp_path):
    made = fxc_json(
        "distill", "--teacher", folder / "qwen2", "--student-layers", "0", "--data", folder / "text.txt", "-o",
        tmp_path / "out", "--steps", "2", "--rate", "1e-9", "--method", "all",
    )  # fmt: skip
    assert "prune:keep=0" in [each["name"] for each in made["passes"]]
    whole, part = (package.load(path).program for path in (folder / "qwen2-int8", tmp_path / "out"))
    assert {name.split(".")[2] for name in part.constants if name.startswith("model.layers.")} == {"0"}
    norm = "model.layers.0.input_layernorm.weight"
    assert (whole.constants[norm] - part.constants[norm]).abs().max() < 1e-6


def test_an_artifact_is_a_student_and_a_teacher(folder, tmp_path):
    made = fxc_json(
        "distill", "--teacher", folder / "qwen2-int8", "--student", folder / "qwen2-int8", "--data", folder / "text.txt",
        "-o", tmp_path / "out", "--steps", "1",
    )  # fmt: skip
    assert [each["name"] for each in made["passes"]].count("int8") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is no student"),
        (("--student", "qwen2", "--student-layers", "0"), "there are two students"),
        (("--student-layers", "0,7"), "there is no layer 7"),
        (("--student-layers", "0,1"), "these are all of its 2 layers"),
        (("--student-layers", "x"), "is no list of layers"),
        (("--student-layers", ""), "a student of no layers"),
        (("--student", "bert"), "tells 320 tokens or labels apart, and the student 2"),
        (("--student", "odd"), "makes no model of this configuration"),
        (("--student", "foreign"), "different tokenizers"),
    ],
)
def test_what_cannot_be_taught_is_refused(folder, small, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    if "odd" in words:
        (folder / "odd").mkdir()
        (folder / "odd" / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_act": "none"}))
    if "foreign" in words:
        (folder / "foreign").mkdir()
        (folder / "foreign" / "config.json").write_text((small / "config.json").read_text())
        byte_tokenizer().save_pretrained(folder / "foreign")
        path = folder / "foreign" / "tokenizer.json"
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"]
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
        path.write_text(json.dumps(content))
    done = fxc("distill", "--teacher", "qwen2", "--data", "text.txt", "-o", "never", *words, "--steps", "1", code=2)
    assert said in done.output and not (folder / "never").exists()


def test_a_folder_without_weights_is_no_model_but_for_a_student(folder, small, tmp_path):
    assert "no weights" in fxc("compile", small, "-o", tmp_path / "out", code=3).stderr
