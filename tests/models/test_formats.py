"""Every format from end to end: the example, pruned or not, and MiniLM."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fxc
from fxc.captured import capture_source
from fxc.compiler import compile_captured
from fxc.data.decoder import decoder_inputs
from fxc.data.samples import samples
from fxc.data.text import encode, tokenizer_of
from fxc.ir import print_program
from fxc.measure.perplexity import perplexity, relative_change
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes

PRUNE = "prune:heads=0.25:ffn=0.25"
FORMATS = ["int4", "fp8", "sparse24", "sparse24,int8"]
WINDOWS = 6
# What each may do to perplexity: twice what was measured over 30 windows.
WORSE = {"int4": 0.04, "fp8": 0.02, "sparse24": 0.9, "sparse24,int8": 0.9}


@pytest.fixture(scope="module")
def pylm(pylm_dir):
    source = after(capture_source(str(pylm_dir), options=Options(verify=False)), "canonicalize")
    tokens = encode(tokenizer_of(pylm_dir), (pylm_dir / "heldout.txt").read_text(encoding="utf-8"))
    return source, tokens, perplexity(portable(source.program), tokens, limit=WINDOWS)


def after(source, passes: str):
    """The captured `source` with these passes done, which every compilation of it then has in common."""
    return replace(source, program=run_passes(source.program, Context(), Options(passes, verify=False))[0])


def portable(program):
    """The program by its operators' own definitions, as `perplexity` calls a model."""
    module = program.module()
    return lambda input_ids, use_cache: SimpleNamespace(logits=module(*decoder_inputs(program, input_ids))[0])


@pytest.mark.parametrize("spec", [pytest.param(s, marks=[pytest.mark.slow] * (s == "sparse24")) for s in FORMATS])
def test_the_example_is_saved_reloaded_and_generates(pylm, tmp_path, spec):
    source, tokens, original = pylm
    model = compile_captured(source, Options(spec))
    assert model.report["bytes_after"] < (0.67 if spec == "sparse24" else 0.62) * model.report["bytes_before"]
    assert {r["fqn"] for r in model.report["passes"][-1]["refusals"]} == {"model.embed_tokens"}
    change, _ = relative_change(original, perplexity(portable(model.program), tokens, limit=WINDOWS))
    assert change < WORSE[spec]
    reloaded_says_the_same(model, tmp_path / "out", tokens)


@pytest.fixture(scope="module")
def pruned(pylm):
    return after(pylm[0], PRUNE)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    "spec", [pytest.param("int4:group=64", marks=pytest.mark.slow), "sparse24,int8"]
)
def test_the_pruned_example_is_saved_reloaded_and_generates(pylm, pruned, tmp_path, spec):
    assert pruned.program.numel() < 0.9 * pylm[0].program.numel()
    model = compile_captured(pruned, Options(spec))
    assert {r["fqn"] for r in model.report["passes"][-1]["refusals"]} == {"model.embed_tokens"}
    reloaded_says_the_same(model, tmp_path / "out", pylm[1])
    if spec == "sparse24,int8":
        at_once = compile_captured(pylm[0], Options(f"{spec},{PRUNE}", verify=False))
        assert print_program(at_once.program) == print_program(model.program)


def reloaded_says_the_same(model, folder, tokens):
    model.save(folder)
    again = fxc.load(folder)
    ids = tokens[None, :12]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert expected.shape == (1, 16)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return capture_source(str(minilm_dir), options=Options(verify=False))


@pytest.mark.parametrize(
    "spec", ["fp8,prune:heads=0.25", *(pytest.param(s, marks=pytest.mark.slow) for s in ("int4", "sparse24,int8"))]
)
def test_minilm_is_saved_and_reloaded(minilm, tmp_path, spec):
    model = compile_captured(minilm, Options(spec))
    assert all("embeddings" in r["fqn"] and r["bytes"] for r in model.report["passes"][-1]["refusals"])
    model.save(tmp_path / "out")
    inputs = samples(model.program)[0]
    with torch.no_grad():
        for found, expected in zip(fxc.load(tmp_path / "out").run(inputs), model.program.module()(*inputs), strict=True):
            assert (found - expected).norm() < 0.08 * expected.norm()
