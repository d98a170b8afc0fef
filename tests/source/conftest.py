"""A one-file and a sharded checkpoint to be damaged."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, shards
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A one-file and a sharded checkpoint of one tiny Llama, bfloat16, to be copied before they are damaged."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SMALL)).to(torch.bfloat16)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="4KB")
    return root


@pytest.fixture
def single(saved, tmp_path):
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))
    assert len(shards(folder)) >= 3
    return folder
