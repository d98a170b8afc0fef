"""Damaged artifacts and damaged Hugging Face folders, one after another."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import fxc
from benchmarks.fuzz.damage import mutate, rehash
from benchmarks.fuzz.guard import Broke, Outcome, judged
from fxc.artifact import companions, config_json, store
from fxc.page import plots
from fxc.page.page import page
from fxc.source.load import load_source

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(48, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embed(ids)))) @ self.embed.weight.t()


def artifacts(folder: Path) -> list[Path]:
    """Whole artifacts: packed, in several shards, coded."""
    made = []
    for passes in ("int8", "int4:group=32:embeddings=int8", "sparse24,int8", "sparsify:sparsity=0.5,pack"):
        model = fxc.optimize(Net(), (torch.zeros(2, 5, dtype=torch.int64),), passes, budget=9.0, layer_budget=9.0)
        out = folder / passes.partition(":")[0].replace(",", "-")
        model.save(out, max_shard_bytes=4000)
        made.append(out)
    return made


def checkpoints(folder: Path) -> list[Path]:
    """Whole Hugging Face folders: one file, several, another family, with a tokenizer's files."""
    import transformers

    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)
    llama.save_pretrained(folder / "single")
    llama.save_pretrained(folder / "sharded", max_shard_size="4KB")
    bert = transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    transformers.BertModel(bert).save_pretrained(folder / "bert")
    for each in ("single", "bert"):
        (folder / each / "tokenizer_config.json").write_text('{"model_max_length": 64, "pad_token": "<pad>"}')
    return [folder / "single", folder / "sharded", folder / "bert"]


def check_artifact(whole: list[Path], place: Path, seed: object, number: int) -> tuple[str, Outcome]:
    """Damage one of them by the seed, and read it. Raises `Broke` where it did what it may not."""
    return _check(whole, place, f"artifact-{seed}-{number}", _load, may_fit=True)


def _load(folder: Path) -> None:
    """All that `fxc.load` reads, before anything is lowered, and what `fxc report` shows."""
    found = store.read(folder)
    config_json.read(folder)
    companions.of_folder(folder)
    with mock.patch.multiple(plots, **_PLOTS):
        page(found.program, found.manifest)


def _remembered(plot: Callable) -> Callable:
    """Drawn once of the same rows or report: matplotlib takes ten times as long as all the rest of an artifact."""
    drawn: dict[str, object] = {}

    @wraps(plot)
    def remembered(*given: object) -> object:
        key = repr(given)
        if key not in drawn:
            drawn[key] = plot(*given)
        return drawn[key]

    return remembered


_PLOTS = {name: _remembered(getattr(plots, name)) for name in ("_bytes", "_errors", "_quality")}


def check_checkpoint(whole: list[Path], place: Path, seed: object, number: int) -> tuple[str, Outcome]:
    return _check(whole, place, f"checkpoint-{seed}-{number}", lambda folder: load_source(str(folder)), may_fit=False)


def _check(whole: list[Path], place: Path, seed: str, read, may_fit: bool) -> tuple[str, Outcome]:
    draw = random.Random(seed)
    shutil.rmtree(place / "it", ignore_errors=True)
    folder = Path(shutil.copytree(draw.choice(whole), place / "it"))
    done = mutate(folder, draw)
    if may_fit and draw.random() < 0.5:
        rehash(folder)
        done += ", hashes that fit"
    try:
        outcome = judged(folder, read)
        if (place / "executed").exists():
            raise Broke("code of the input was executed")
    except Broke as error:
        raise Broke(f"{seed} ({done}): {error}") from error
    return done, outcome
