"""The end-to-end benchmark of decoding on a tiny model, on the CPU. No time is asserted."""

import json
import os
import subprocess
import sys

import pytest
import torch
from repo import REPO

from benchmarks.decode import __main__ as decode
from benchmarks.decode.cells import cells_of, same_tokens
from benchmarks.decode.model import Variant, captured, config_of, read_bytes, with_weights

OPTIONS = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--batch", "1,2", "--prompt", "6", "--new", "4",
           "--prefill", "9", "--rounds", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert decode.main([*OPTIONS, "--passes", "int4,sparse24+int8", "--layers", "1", "--out", str(out)]) == 0
    (written,) = out.glob("decode-*.json")
    return json.loads(written.read_text()), next(out.glob("decode-*.md")).read_text()


def test_every_cell_is_measured(report):
    found, text = report
    cells = [(r["passes"], r["what"], r["mode"], r["batch"]) for r in found["rows"]]
    variants = ("dense", "int4", "sparse24+int8")
    assert cells == [
        (name, *cell)
        for name in variants
        for cell in (("decode", "launched", 1), ("decode", "launched", 2), ("prefill", "", 1), ("generate", "launched", 1))
    ]
    assert found["not_measured"] == [] and found["layers"] == 1
    assert all(len(r["seconds"]) == 2 and r["low"] <= r["tokens_per_s"] <= r["high"] for r in found["rows"])
    assert found["rows"][0]["slots"] == 16, "10 columns in one size of buffers"
    for row in found["rows"]:
        assert sum(row["forms"].values()) == (0 if row["passes"] == "dense" else 8), "seven of a layer and the head"
        if "dequantized" in row["forms"] and row["what"] == "decode":
            assert row["read_gb_per_s"] is None, "what is read is not what is stored"
    assert "- int4, eager: layers run as" in text and "- dense" not in text
    assert "cut to 1 of its 2 layers" in text and text.count("| int4 |") == 4


def test_weights_read_leave_out_the_table_of_embeddings(report):
    dense = report[0]["rows"][0]
    config = config_of("tiny", 1)
    table = config.vocab_size * config.hidden_size * 4
    read = dense["read_gb_per_s"] * 1e9 * sorted(dense["seconds"])[0] / 4
    assert read < dense["weights_gb"] * 1e9 * 1.5 and dense["weights_gb"] * 1e9 > 2 * table
    program, computed = captured(config, torch.float32)
    made = with_weights(program, computed, torch.device("cpu"))
    assert read_bytes(made) == made.nbytes() - table


def test_the_model_that_is_measured_computes_what_transformers_would():
    """Weights made after capture, the angles of positions too, are those of a model that was never on meta."""
    from transformers import AutoModelForCausalLM

    config = config_of("tiny", None)
    program, computed = captured(config, torch.float32)
    made = with_weights(program, computed, torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(config).eval()
    missing = model.load_state_dict({k: v for k, v in made.constants.items() if "inv_freq" not in k}, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    variant = Variant(made, config, torch.device("cpu"), "eager")
    ids, mask, places = variant.inputs(2, 7)
    token, present = variant.prompt(2, 7)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(present[0], expected.past_key_values.layers[0].keys)
    torch.testing.assert_close(present[3], expected.past_key_values.layers[1].values)
    assert torch.equal(token[:, 0], expected.logits[:, -1].argmax(-1))


def test_on_a_gpu_graphs_come_first_and_few_tokens_are_launched_one_by_one():
    options = decode.parse(["--device", "cuda", "--batch", "1,16"])
    assert options.modes == ["graph", "launched"]
    assert cells_of(options, "eager") == [
        ("decode", "graph", 1), ("decode", "graph", 16), ("prefill", "", 1), ("generate", "graph", 1),
        ("decode", "launched", 1),
    ]  # fmt: skip
    assert cells_of(options, "inductor") == [("decode", "graph", 1)]


@pytest.mark.slow
def test_a_recording_that_gives_other_tokens_fails(monkeypatch, tmp_path):
    row = {"passes": "int4", "backend": "eager", "what": "decode", "batch": 2, "tokens": [[1, 2, 3], [4, 5, 6]]}
    launched = row | {"tokens": [[1, 2], [4, 5]]}
    assert same_tokens(launched, [row]) and same_tokens(launched | {"batch": 1}, [row])
    assert not same_tokens(launched | {"tokens": [[1, 2], [4, 6]]}, [row])

    def parse(arguments):
        options = original(arguments)
        options.modes = ["launched", "launched"]
        return options

    original, tokens = decode.parse, iter(([[1, 2]], [[1, 3]]))
    found = decode.decode
    monkeypatch.setattr(decode, "parse", parse)
    monkeypatch.setattr(decode, "decode", lambda *a: found(*a) | {"tokens": next(tokens)})
    assert decode.main([*OPTIONS, "--passes", "", "--batch", "1", "--prefill", "0", "--out", str(tmp_path)]) == 1
    (written,) = tmp_path.glob("*.md")
    assert "failed: its tokens are not those of the same step" in written.read_text()


@pytest.mark.slow
def test_what_is_not_measured_is_named(tmp_path, capsys):
    assert decode.main([*OPTIONS, "--passes", "int4", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "not measured: int4, eager: 0.0 s were over" in capsys.readouterr().out
    assert decode.main([*OPTIONS, "--passes", "int4:group=48", "--batch", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "not measured: int4:group=48, eager: failed: error[FXC-E2]" in said
    assert "| dense | eager | decode launched | 1 |" in said


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.decode", "--device", "cuda", "--out", tmp_path]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "not measured: torch finds no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_configuration_is_the_published_one():
    config = config_of("qwen2.5-7b", None)
    program, _ = captured(config_of("qwen2.5-7b", 1), torch.bfloat16)
    per_layer = sum(t.numel() for n, t in program.constants.items() if ".layers.0." in n)
    ends = sum(t.numel() for n, t in program.constants.items() if ".layers." not in n and "inv_freq" not in n)
    assert config.num_hidden_layers * per_layer + ends == 7_615_616_512  # the parameters that its card gives as 7.61 B
