"""The files that travel with a model: tokenizers, processors, what sentence-transformers needs; whose they are and who may read
them."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from families import build
from tiny import byte_tokenizer, save
from torch import nn

import fxc
from fxc.artifact import companions, staging
from fxc.errors import InputRefused, ResourceError, UsageError
from fxc.report.outputs import generate

VOCABULARY = re.compile(r"^VOCAB_FILES_NAMES = \{(.*?)\}", re.DOTALL | re.MULTILINE)
SENTENCES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@pytest.fixture(scope="module")
def decoder():
    return build("qwen2")[0]


def sentence_model(folder):
    """BERT as sentence-transformers saves one with a dense layer behind it."""
    from safetensors.torch import save_file

    save("bert", folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    listed = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"} for i, (p, t) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for name in SENTENCES[2:]:
        (folder / name).write_text("{}")
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"in": name}))
    save_file({"linear.weight": torch.eye(8)}, folder / "2_Dense/model.safetensors")
    return folder


def test_what_sentence_transformers_needs_travels_and_travels_on(tmp_path):
    origin = sentence_model(tmp_path / "bert")
    fxc.optimize(str(origin), passes="int8").save(tmp_path / "a")
    again = fxc.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in (*SENTENCES, "2_Dense/config.json", "2_Dense/model.safetensors", "tokenizer.json"):
        assert (tmp_path / "b" / name).read_bytes() == (origin / name).read_bytes(), name
    (tmp_path / "b/1_Pooling/config.json").write_text("{}")
    with pytest.raises(InputRefused, match="1_Pooling"):
        fxc.load(tmp_path / "b")


def test_a_real_sentence_model(minilm_dir):
    assert set(SENTENCES) <= companions.of_folder(minilm_dir).keys()


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "vocab.txt", "1_Pooling"])
def test_a_link_out_of_the_folder_does_not_travel(name, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/config.json").write_text("{}")
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path / "secret" if name == "1_Pooling" else tmp_path / "secret/config.json")
    with pytest.raises(InputRefused, match="leads out"):
        companions.of_folder(folder)


def test_damaged_weights_of_a_submodule_do_not_travel(tmp_path):
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense/model.safetensors").write_bytes(b"\x80\x02c")
    with pytest.raises(InputRefused, match="truncated"):
        companions.of_folder(tmp_path)


def test_every_vocabulary_that_transformers_knows_travels():
    from transformers import models

    sources = Path(models.__file__).parent.glob("*/tokenization_*.py")
    declared = [match.group(1) for path in sources for match in VOCABULARY.finditer(path.read_text())]
    names = {name for text in declared for name in re.findall(r'"([^"]+)"', text) if "." in name}
    assert {"vocab.txt", "merges.txt", "spiece.model", "source.spm"} <= names and len(names) > 15
    assert [name for name in sorted(names) if not companions.is_tokenizer_file(name)] == []


# ------------------------------------------------------------------------------------------------------- a tokenizer of its own


def test_a_tokenizer_is_saved_with_a_module_and_cuts_its_texts(decoder, tmp_path):
    made = fxc.optimize(
        decoder, passes="prune:ffn=0.25:criterion=taylor", calib=["hello world" * 5], tokenizer=byte_tokenizer()
    )
    made.save(tmp_path / "out")
    found = generate(fxc.load(tmp_path / "out"), tmp_path / "out", "hello", 3)
    assert found["tokens"] == 3


def test_a_given_tokenizer_takes_the_place_of_the_folders(tmp_path):
    origin = save("bert", tmp_path / "bert")
    (origin / "vocab.txt").write_text("old")
    made = fxc.optimize(str(origin), passes="int8", tokenizer=byte_tokenizer())
    assert "vocab.txt" not in made.files and isinstance(made.files["tokenizer.json"], bytes) and "config.json" in made.files
    byte_tokenizer().save_pretrained(tmp_path / "t")
    made = fxc.optimize(build("bert")[0], passes="int8", tokenizer=tmp_path / "t")
    assert made.files["tokenizer.json"] == tmp_path / "t/tokenizer.json"


@pytest.mark.parametrize("what", [nn.Linear(2, 2), "no/such/folder", 3])
def test_what_is_no_tokenizer_is_refused_before_capture(what, monkeypatch):
    monkeypatch.setattr("fxc.captured.capture", None)
    with pytest.raises(UsageError, match="tokenizer"):
        fxc.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), passes="", tokenizer=what)


def test_a_tokenizer_can_be_added_later_as_the_hint_says(decoder, tmp_path):
    out = tmp_path / "out"
    fxc.optimize(decoder, passes="").save(out)
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        generate(fxc.load(out), out, "hello", 3)
    assert "tokenizer.save_pretrained(folder)" in caught.value.hint
    byte_tokenizer().save_pretrained(out)
    model = fxc.load(out)
    assert generate(model, out, "hello", 3)["tokens"] == 3
    model.save(tmp_path / "kept")
    (tmp_path / "kept/merges.txt").write_text("another's")
    with pytest.raises(InputRefused, match="does not list"):
        fxc.load(tmp_path / "kept")
    (out / "generation_config2.json").write_text("{}")
    with pytest.raises(InputRefused, match="does not list"):
        fxc.load(out)


def test_an_added_tokenizer_may_not_be_a_link(tmp_path):
    out = tmp_path / "out"
    fxc.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), passes="").save(out)
    (tmp_path / "vocab.txt").write_text("secret")
    (out / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    with pytest.raises(InputRefused, match="leads out"):
        fxc.load(out)


# --------------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_has_the_permissions_of_a_new_one(mask, tmp_path):
    before = os.umask(mask)
    try:
        origin = save("bert", tmp_path / "bert")
        (origin / "tokenizer.json").chmod(0o600)
        fxc.optimize(str(origin), passes="").save(tmp_path / "out")
        fxc.load(tmp_path / "out").save_pretrained(tmp_path / "plain")
    finally:
        os.umask(before)
    for folder in ("out", "plain"):
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / folder).rglob("*") if p.is_file()}
        assert set(modes.values()) == {0o666 & ~mask}, modes
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o777 & ~mask


# ------------------------------------------------------------------------------------------------------------- before any work


def test_an_output_that_cannot_be_is_seen_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out, what in ((tmp_path / "file", "is a file"), (tmp_path / "file/out", "in the way")):
        with pytest.raises(UsageError, match=what):
            staging.check_target(out)
    with pytest.raises(ResourceError, match="could not be written"):
        staging.check_target(tmp_path / ("x" * 300))
    made = []
    monkeypatch.setattr(
        "pathlib.Path.mkdir", lambda self, *a, **k: made.append(self) or (_ for _ in ()).throw(PermissionError(13, "no"))
    )
    with pytest.raises(ResourceError, match="could not be written"):
        staging.check_target(tmp_path / "new/out")
    assert made and sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_is_seen_before_any_work(tmp_path, monkeypatch):
    staging.check_target(tmp_path / "a/b/out", nbytes=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ResourceError, match="not enough space"):
        staging.check_target(tmp_path / "out", nbytes=1000)
    assert not list(tmp_path.iterdir())


def test_calibration_data_that_is_needed_is_asked_for_before_capture(tmp_path, monkeypatch):
    monkeypatch.setattr("fxc.compiler.capture_source", None)
    for passes in ("prune:ffn=0.5:criterion=wanda", "int8,prune:layers=0.25"):
        with pytest.raises(UsageError, match="calibration data") as caught:
            fxc.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), passes=passes)
        assert "--calib" in caught.value.hint
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="in the way"):
        fxc.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), passes="int8", dump_dir=tmp_path / "file")
