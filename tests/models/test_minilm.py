"""A real model from end to end: all-MiniLM-L6-v2 compiled to int8, saved, loaded in a fresh process.

The 100 sentences are from the Python documentation (PSF licence).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from repo import REPO

import fxc

SENTENCES = (REPO / "tests" / "records" / "sentences.txt").read_text().splitlines()[::2]
EMBED = """
import sys, torch, fxc
from transformers import AutoTokenizer
folder, sentences, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(open(sentences).read().splitlines(), padding=True, truncation=True, max_length=128, return_tensors="pt")
hidden = fxc.load(folder)(**inputs).last_hidden_state.float()
mask = inputs["attention_mask"][..., None].float()
torch.save(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), out)
"""


@pytest.fixture(scope="module")
def expected(minilm_dir):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    model = AutoModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    assert len(SENTENCES) == 100
    inputs = tokenizer(SENTENCES, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize(("dtype", "limit"), [("auto", 0.66), pytest.param("bfloat16", 0.4, marks=pytest.mark.slow)])
def test_int8_is_small_and_close_after_reloading(minilm_dir, expected, tmp_path, dtype, limit):
    compiled = fxc.optimize(str(minilm_dir), passes="int8", dtype=dtype)
    report = compiled.report
    assert report["bytes_after"] < limit * report["bytes_before"]
    left = {r["fqn"].partition(".")[0] for r in report["passes"][-1]["refusals"]}
    assert left == {"embeddings"}, "every linear layer is quantized"
    if dtype == "auto":
        assert by_its_operators(compiled, minilm_dir, expected) >= 0.998
    compiled.save(tmp_path / "out")
    weights = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    original = sum(f.stat().st_size for f in Path(minilm_dir).glob("*.safetensors"))
    assert weights < limit * original
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    subprocess.run(
        [sys.executable, "-c", EMBED, str(tmp_path / "out"), str(tmp_path / "sentences.txt"), str(tmp_path / "found.pt")],
        check=True,
        timeout=300,
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert (found * expected).sum(-1).mean() >= 0.997


def test_the_program_without_a_pass_is_the_model(minilm_dir, expected):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    compiled = fxc.optimize(str(minilm_dir), passes="canonicalize")
    inputs = tokenizer(SENTENCES[:8], padding=True, return_tensors="pt")
    del inputs["attention_mask"]  # all ones by default, and so are the paddings then
    inputs.pop("token_type_ids")
    assert compiled(**inputs).last_hidden_state.shape[0] == 8
    with pytest.raises(fxc.FxcError, match="input_ids is missing"):
        compiled()
    with pytest.raises(fxc.FxcError, match="without the argument 'inputs_embeds'"):
        compiled(inputs_embeds=torch.zeros(1, 2, 384))


def other_sentences(count: int) -> str:
    """Sentences of the Python documentation that are not among those, one a line."""
    known = set(SENTENCES)
    found = (re.sub(r"\s+", " ", each).strip() for each in re.split(r"(?<=[.])\s+", " ".join(topics.values())))
    prose = [each for each in found if 40 < len(each) < 300 and not re.search(r"==|::", each) and each not in known]
    return "\n".join(prose[:: len(prose) // count][:count])


@pytest.mark.parametrize(
    ("passes", "least"),
    [
        ("int8:mode=static", 0.995),
        pytest.param("int8:mode=static:smooth=false:only=*.dense,int8", 0.994, marks=pytest.mark.slow),
    ],
)
def test_sentences_keep_their_meaning(minilm_dir, expected, tmp_path, passes, least):
    """Queries, keys and values read the residual stream, whose few large channels cost one scale for all of it the most: smooth
    moves them into the weights."""
    calib = tmp_path / "calib.txt"
    calib.write_text(other_sentences(64))
    assert by_its_operators(fxc.optimize(str(minilm_dir), passes=passes, calib=calib), minilm_dir, expected) >= least


def by_its_operators(compiled, minilm_dir, expected) -> float:
    """The mean cosine of its embeddings, as the operators of the program are defined."""
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(minilm_dir)(
        SENTENCES, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = compiled.program.module()(*(inputs[each.name] for each in compiled.program.signature.inputs))[0]
    mask = inputs["attention_mask"][..., None].float()
    found = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return (found * expected).sum(-1).mean().item()
