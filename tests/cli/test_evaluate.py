"""`fxc eval`: perplexity, agreement, and what it refuses."""

import pytest
from command import fxc, fxc_json
from tiny import save


def test_eval_measures_perplexity_of_models_and_artifacts(folder):
    text = (folder / "text.txt").read_text()
    options = ("--text", folder / "text.txt", "--window", 64)
    original, packed = (fxc_json("eval", folder / name, *options) for name in ("qwen2", "qwen2-int8"))
    assert original["tokens"] == packed["tokens"] == len(text) - -(-len(text) // 64)
    assert packed["perplexity"] == pytest.approx(original["perplexity"], rel=0.02)
    assert f"{original['perplexity']:.4f}" in fxc("eval", folder / "qwen2", *options).stdout


def test_eval_measures_agreement(folder):
    options = ("--text", folder / "text.txt", "--window", 64, "--windows", 2)
    found = fxc_json("eval", folder / "qwen2-int8", *options, "--against", folder / "qwen2")
    assert found["outputs"]["next_token"] > 0.8 and found["outputs"]["relative_error"] < 0.05
    assert len(found["layers"]) == 16 and found["layers"][0]["own"] >= found["layers"][-1]["own"]
    assert found["perplexity"] == pytest.approx(found["perplexity_against"], rel=0.02)
    first = found["parting"]["bits"]["name"]
    assert first.startswith("model.layers.0.") and found["parting"]["gone"] == found["parting"]["new"] == []
    said = fxc("eval", folder / "qwen2-int8", *options, "--against", folder / "qwen2", "--tolerance", 0).stdout
    assert f"bit for bit the same up to {first}" in said and f"the first layer beyond 0.00% is {first}" in said
    done = fxc("eval", folder / "vit-int8", "--against", folder / "vit")
    assert "cosine_mean" in done.stdout and "made-up inputs" in done.stdout


def test_eval_fails_clearly(folder, tmp_path):
    fxc("eval", folder / "qwen2", code=2)
    assert "--against" in fxc("eval", folder / "bert-int8", "--text", folder / "text.txt", code=2).stderr
    assert "tokens" in fxc("eval", folder / "qwen2", "--text", folder / "text.txt", "--window", 300, code=2).stderr
    assert "tokenizer" in fxc("eval", save("gpt2", tmp_path / "g", False), "--text", folder / "text.txt", code=2).stderr
    fxc("eval", folder / "vit-int8", "--against", folder / "bert", code=2)
