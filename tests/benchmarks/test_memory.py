"""The benchmark of memory, on a tiny model."""

import json

import pytest

from benchmarks import memory


@pytest.mark.slow
def test_each_row_is_a_process_of_its_own_and_says_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PASSES", memory.PASSES[1:])  # each imports torch, transformers and fxc
    assert memory.main(["--model", "tiny", "--new", "2", "--prompt", "8", "--threads", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("memory-*.json")
    report = json.loads(path.read_text())
    assert [row["model"] for row in report["rows"]] == ["transformers", *memory.PASSES]
    for row in report["rows"]:
        assert 0 < row["held"] <= row["peak"] and row["load_s"] <= row["first_s"] and row["saved"] > 0
    assert report["rows"][0]["layers"] == [] and report["rows"][1]["layers"]
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| ") == 3 and "int4:embeddings=int4" in table
