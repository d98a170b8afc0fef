"""`fxc eval --history` and `--fail-over`: a line each time, a plot, and exit code 5 beyond the limit."""

import json

import pytest
from command import fxc, fxc_json

from fxc.report import drift


def test_each_evaluation_adds_a_line(folder, tmp_path):
    path = tmp_path / "drift.jsonl"
    against = ("--against", folder / "qwen2", "--data", folder / "text.txt", "--window", 64, "--windows", 2)
    options = (*against, "--history", path)
    found = fxc_json("eval", folder / "qwen2-int8", *options)
    assert f"added line 2 to {path}" in fxc("eval", folder / "qwen2-int8", *options, "--fail-over", "50%").stdout
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["measure"] == "perplexity" and first["worse"] == found["perplexity_change"] == second["worse"]
    manifest = json.loads((folder / "qwen2-int8" / "fxc.json").read_text())
    assert first["artifact"] == manifest["sha256"] and first["data_sha256"] == second["data_sha256"]
    assert set(first["milliseconds"]) == {"prefill", "decode"} and first["versions"]["torch"] and first["cpu"]
    assert len(first["layers"]) == 16 and first["inputs"] == "2 windows of 64 tokens"
    assert path.with_suffix(".svg").exists() == drift.is_there()
    assert "another artifact" in fxc("eval", folder / "bert-int8", *options, code=3).stderr


def test_beyond_the_limit_it_ends_with_5(folder, tmp_path):
    path = tmp_path / "drift.jsonl"
    options = ("--against", folder / "vit", "--history", path)
    done = fxc("eval", folder / "vit-int8", *options, "--fail-over", "0", code=5)
    assert "--fail-over is 0.000%" in done.stderr and len(path.read_text().splitlines()) == 1, "the line is there all the same"
    error = json.loads(fxc("eval", folder / "vit-int8", *options, "--fail-over", "0.0%", "--json", code=5).stdout)["error"]
    assert error["code"] == "FXC-E5" and "relative error" in error["why"]
    fxc("eval", folder / "vit-int8", "--against", folder / "vit", "--fail-over", "0.9")


def test_rows_with_inputs_are_data_too(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"line {n} of a text"}) + "\n" for n in range(3)))
    found = fxc_json("eval", folder / "bert-int8", "--against", folder / "bert", "--data", rows, "--fail-over", "0.9")
    assert found["inputs"] == "3 samples of rows.jsonl" and found["measure"] == "relative error"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--history", "h.jsonl"), "compares with an original"),
        (("--fail-over", "1%", "--text", "text.txt"), "compares with an original"),
        (("--against", "vit", "--plot", "p.svg"), "drawn of a history"),
        (("--against", "vit", "--fail-over", "much"), "no limit"),
        (("--against", "vit", "--fail-over", "-1%"), "no limit"),
        (("--against", "vit", "--fail-over", "nan"), "no limit"),
        (("--against", "vit", "--history", "h.svg"), "no plot can be written"),
        (("--against", "vit", "--data", "gone.txt"), "no such evaluation data"),
        (("--against", "vit", "--data", "text.txt", "--text", "text.txt"), "one and the same"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(options, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert said in fxc("eval", "vit-int8", *options, code=2).stderr
    assert "history is of an artifact" in fxc("eval", "vit", "--against", "vit", "--history", "h.jsonl", code=2).stderr
