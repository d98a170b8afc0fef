"""The bundled example from end to end: compiled to int8, saved, reloaded in a fresh process, as good as before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import fxc
from fxc.cli.app import app
from fxc.data.decoder import decoder_inputs
from fxc.data.text import encode, tokenizer_of
from fxc.measure.perplexity import perplexity
from fxc.source.load import load_source

WINDOWS = 30


def fxc_command(*arguments: str) -> str:
    run = subprocess.run([sys.executable, "-m", "fxc", *arguments], check=True, capture_output=True, text=True, timeout=600)
    return run.stdout


def test_int8_keeps_perplexity_and_is_reloaded_by_a_fresh_process(pylm_dir, tmp_path):
    compiled = fxc.optimize(str(pylm_dir), passes="int8")
    report = compiled.report
    assert report["bytes_after"] < 0.66 * report["bytes_before"]
    assert [(r["fqn"], "tied" in r["reason"]) for r in report["passes"][-1]["refusals"]] == [("model.embed_tokens", True)]
    compiled.save(tmp_path / "out")

    tokens = encode(tokenizer_of(pylm_dir), (pylm_dir / "heldout.txt").read_text(encoding="utf-8"))
    original = perplexity(load_source(str(pylm_dir)).model, tokens, limit=WINDOWS)
    small = perplexity(compiled, tokens, limit=WINDOWS)
    assert original.value < 15, "the example is a trained model, and its tokenizer the one it was trained with"
    assert abs(small.value / original.value - 1) < 0.01
    # This machine may run some layers in float because that is faster: the integers have to be as good by themselves.
    module = compiled.program.module()

    def unlowered(input_ids, use_cache):
        return SimpleNamespace(logits=module(*decoder_inputs(compiled.program, input_ids))[0])

    portable = perplexity(unlowered, tokens, limit=WINDOWS)
    assert abs(portable.value / original.value - 1) < 0.01

    ids = fxc_command("run", str(tmp_path / "out"), "--prompt", "import os\n", "--max-new-tokens", "8", "--json")
    assert json.loads(ids)


def test_the_command_that_the_project_is_for(pylm_dir, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(pylm_dir.parent)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compile", "examples/pylm", "--passes", "int8,prune"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-2:] == [
        "written to pylm-int8-prune",
        "run it: fxc run pylm-int8-prune --prompt TEXT; in Python: import fxc; model = fxc.load('pylm-int8-prune'); "
        "model.generate(input_ids, max_new_tokens=64)",
    ]
    assert "the same again: fxc compile examples/pylm --passes int8,prune --plan pylm-int8-prune/plan.json -o OTHER" in lines
    assert any(line.startswith("quality was not measured: --eval-text FILE") for line in lines)
    model = fxc.load("pylm-int8-prune")
    assert model.program.nbytes() < 0.58 * model.report["bytes_before"]
    again = fxc.optimize("examples/pylm", passes="int8,prune:plan=pylm-int8-prune/plan.json")
    assert str(again.program) == str(model.program)
    assert all((t == model.program.constants[name]).all() for name, t in again.program.constants.items())
    rise = _rise(model, pylm_dir, encode(tokenizer_of(pylm_dir), (pylm_dir / "heldout.txt").read_text()))
    assert 0 < rise < 0.03, "judged on texts that the model wrote itself"


@pytest.mark.slow
def test_prune_with_data_stays_within_its_budget_on_other_data(pylm_dir, tmp_path):
    text = (pylm_dir / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "calib.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    model = fxc.optimize(pylm_dir, passes="int8,prune", calib=tmp_path / "calib.txt")
    step = next(p for p in model.report["passes"] if p["name"] == "prune")
    assert "of the loss on 28 held-out calibration samples" in step["notes"][0]
    removed = sum(r["removed"] for r in step["removed"])
    assert 400 < removed < 1920 and all(2 * r["removed"] <= r["before"] for r in step["removed"])
    tokens = encode(tokenizer_of(pylm_dir), text[len(text) // 2 :])
    assert 0.002 < _rise(model, pylm_dir, tokens) < 0.03


def _rise(model, original, tokens) -> float:
    """By what share the loss of a token rises."""
    before, after = (
        math.log(perplexity(m, tokens, limit=WINDOWS).value) for m in (load_source(str(original)).model, model)
    )
    return after / before - 1
