"""Models in the hub's cache."""

from pathlib import Path

import pytest
from checkpoints import refusal
from transformers import LlamaForCausalLM

from fxc.source.load import load_source


def test_a_hub_id_that_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refusal("acme/tiny", "acme/tiny: not in the local", "HF_HUB_OFFLINE", "hf download acme/tiny")
    refusal("acme/tiny", "at revision v9", revision="v9")


@pytest.fixture
def cached(single, tmp_path, monkeypatch):
    """The hub's cache with the model in it, as huggingface_hub lays it out: links into blobs."""
    repo = tmp_path / "hub" / "models--acme--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    for path in single.iterdir():
        path.rename(repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_cached_hub_id_loads_offline(cached):
    loaded = load_source("acme/tiny")
    assert isinstance(loaded.model, LlamaForCausalLM) and loaded.tokenizer_dir == cached
    described = {key: loaded.source[key] for key in ("kind", "id", "revision", "commit")}
    assert described == {"kind": "hub", "id": "acme/tiny", "revision": "main", "commit": cached.name}
    assert load_source("acme/tiny", revision=cached.name).source["revision"] == cached.name


def test_a_link_out_of_the_cache_is_refused(cached, tmp_path):
    outside = (tmp_path / "outside.json").absolute()
    outside.write_text("{}")
    (cached / "tokenizer.json").symlink_to(outside)
    refusal("acme/tiny", "link", "tokenizer.json", outside)
