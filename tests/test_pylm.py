"""The bundled example from end to end: compiled to int8, saved, reloaded in a fresh process, as good as before."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import fxc
from fxc import evaluate
from fxc.sources import load_source

WINDOWS = 60


def fxc_command(*arguments: str) -> str:
    run = subprocess.run([sys.executable, "-m", "fxc", *arguments], check=True, capture_output=True, text=True, timeout=600)
    return run.stdout


def test_int8_keeps_perplexity_and_is_reloaded_by_a_fresh_process(pylm_dir, tmp_path):
    compiled = fxc.optimize(str(pylm_dir), passes="int8")
    report = compiled.report
    assert report["bytes_after"] < 0.66 * report["bytes_before"]
    assert [(r["fqn"], "tied" in r["reason"]) for r in report["passes"][-1]["refusals"]] == [("model.embed_tokens", True)]
    compiled.save(tmp_path / "out")

    tokens = evaluate.encode(evaluate.tokenizer_of(pylm_dir), (pylm_dir / "heldout.txt").read_text(encoding="utf-8"))
    original = evaluate.perplexity(load_source(str(pylm_dir)).model, tokens, limit=WINDOWS)
    small = evaluate.perplexity(compiled, tokens, limit=WINDOWS)
    assert original.value < 15, "the example is a trained model, and its tokenizer the one it was trained with"
    assert abs(small.value / original.value - 1) < 0.01
    # This machine may run some layers in float because that is faster: the integers have to be as good by themselves.
    module = compiled.program.module()

    def unlowered(input_ids, use_cache):
        return SimpleNamespace(logits=module(*evaluate.decoder_inputs(compiled.program, input_ids))[0])

    portable = evaluate.perplexity(unlowered, tokens, limit=WINDOWS)
    assert abs(portable.value / original.value - 1) < 0.01

    ids = fxc_command("run", str(tmp_path / "out"), "--prompt", "import os\n", "--max-new-tokens", "8", "--json")
    assert json.loads(ids)
