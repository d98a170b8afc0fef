"""fxc push: what is uploaded and what the card says, with everything but the network."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import fxc as command
from command import fxc_json
from families import build
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

import fxc
from fxc.errors import InputRefused, ResourceError, UsageError
from fxc.export.folder import MARK
from fxc.publish.card import LOADING, card
from fxc.publish.push import CARD, push


class FakeApi:
    """A hub that remembers; as strict about names as the real one."""

    def __init__(self, there: tuple[str, ...] = (), error: Exception | None = None):
        self.there, self.error, self.asked, self.uploaded, self.deleted = set(there), error, [], {}, []

    def create_repo(self, repo, **options):
        validate_repo_id(repo)
        self.asked.append((repo, options))
        if self.error is not None:
            raise self.error
        return f"https://huggingface.co/{repo}"

    def list_repo_files(self, repo):
        return sorted(self.there)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
        files = {path.relative_to(folder_path).as_posix(): path for path in Path(folder_path).rglob("*") if path.is_file()}
        kept = filter_repo_objects(files, allow_patterns=allow_patterns)
        self.uploaded |= {name: files[name].read_bytes() for name in kept}
        self.deleted = delete_patterns

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        self.uploaded[path_in_repo] = path_or_fileobj


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "out"
    fxc.optimize(build("qwen2")[0], passes="int8", budget=9, layer_budget=9).save(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """What the command finds in the place of the hub."""
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **options: api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return api


def test_an_artifact_goes_up_as_it_is_with_a_card(artifact, hub, tmp_path):
    told = fxc_json("push", artifact, "someone/small", "--private")
    assert told["pushed"] and told["url"].endswith("someone/small") and told["card_written"]
    assert hub.asked == [("someone/small", {"private": True, "repo_type": "model", "exist_ok": True})]
    for name in ("fxc.json", "program.fxc", "config.json"):
        assert hub.uploaded[name] == (artifact / name).read_bytes()
    text = hub.uploaded[CARD].decode()
    assert text == told["card"] and "library_name: \"fxc\"" in text and "pipeline_tag: \"text-generation\"" in text
    report = fxc.load(artifact).report
    assert f"{report['parameters_before']:,}" in text and "| `int8` |" in text
    assert 'fxc.load(snapshot_download("someone/small"))' in text
    # What was uploaded loads, card and all.
    for name, content in hub.uploaded.items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(fxc.load(tmp_path)(ids).logits, fxc.load(artifact)(ids).logits)


def test_an_export_goes_up_in_its_format(artifact, hub):
    told = fxc_json("push", artifact, "someone/small", "--format", "fxc")
    assert told["format"] == "fxc" and "model.safetensors" in hub.uploaded and "program.fxc" not in hub.uploaded
    assert json.loads(hub.uploaded["config.json"])["quantization_config"]["quant_method"] == "fxc"
    assert "import fxc" in told["card"] and 'AutoModelForCausalLM.from_pretrained("someone/small")' in told["card"]
    assert hub.deleted is None


@pytest.mark.parametrize(
    ("kind", "file", "says"),
    [
        ("onnx", "model.onnx", 'snapshot_download("someone/small") + "/model.onnx"'),
        ("gguf", "model.gguf", 'Llama.from_pretrained("someone/small", "model.gguf")'),
        ("fxc", "model.safetensors", 'AutoModelForCausalLM.from_pretrained("someone/small")'),
    ],
)
def test_a_folder_that_an_export_wrote_goes_up_as_it_is(artifact, hub, tmp_path, kind, file, says):
    out = tmp_path / "export"
    fxc_json("export", artifact, "-o", out, "--format", kind)
    assert json.loads((out / MARK).read_text()) == {"format": kind, "version": metadata.version("fxc")}
    others = {"key", "model.gguf", "model.onnx", "model.safetensors"} - {file}
    for name in others:
        (out / name).write_text("secret")
    told = fxc_json("push", out, "someone/small")
    assert told["format"] == kind and says in told["card"]
    assert hub.uploaded[file] == (out / file).read_bytes() and not others & hub.uploaded.keys() and MARK in hub.uploaded
    assert f"this is an export in the format {kind}" in command("push", out, "a/b", "--format", "hf", code=2).output


def test_a_package_goes_up_with_the_names_of_its_inputs(hub, tmp_path):
    for name in ("model.pt2", "names.json", "tokenizer.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / MARK).write_text('{"format": "aoti"}')
    told = fxc_json("push", tmp_path, "someone/small")
    assert told["format"] == "aoti" and set(hub.uploaded) == {"model.pt2", "names.json", "tokenizer.json", MARK, CARD}
    assert 'library_name: "pytorch"' in told["card"] and "aoti_load_package" in told["card"] and "kind of CPU" in told["card"]


@pytest.mark.parametrize("mark", [None, "{}", '{"format": "gguf"}', '{"format": ["hf"]}', '{"format": "artifact"}'])
def test_a_model_that_fxc_did_not_write_is_no_export(hub, tmp_path, mark):
    build("qwen2")[0].save_pretrained(tmp_path / "base")
    if mark is not None:
        (tmp_path / "base" / MARK).write_text(mark)
    assert "not an fxc artifact" in command("push", tmp_path / "base", "a/b", code=3).output
    assert hub.asked == [] and hub.uploaded == {}


def test_what_transformers_saved_of_a_model_in_fxcs_layers_is_an_export(artifact, hub, tmp_path):
    fxc_json("export", artifact, "-o", tmp_path / "export", "--format", "fxc")
    (tmp_path / "export" / MARK).unlink()
    assert fxc_json("push", tmp_path / "export", "someone/small")["format"] == "fxc"


def test_a_classifier_is_loaded_with_its_head():
    name = "BertForSequenceClassification"
    assert f"{name}.from_pretrained" in card({}, {"class": name}, "a/b", "hf", 1)


def test_a_card_that_is_there_stays(artifact, hub):
    hub.there.add(CARD)
    assert "stays as it is" in command("push", artifact, "someone/small").stdout
    assert CARD not in hub.uploaded and "fxc.json" in hub.uploaded


def test_what_an_earlier_push_left_goes_and_what_others_put_there_stays(artifact, hub):
    hub.there |= {"fxc.json", "old.safetensors"}
    assert "stays" not in command("push", artifact, "someone/small").stdout and "*.safetensors" in hub.deleted
    hub.there.remove("fxc.json")
    assert "what was there before stays: old.safetensors" in command("push", artifact, "someone/small").stdout
    assert hub.deleted is None


def test_what_else_lies_in_the_folder_stays_there(artifact, hub, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(artifact, folder)
    (tmp_path / "key").write_text("secret")
    (folder / ".env").write_text("secret")
    (folder / "README.md").write_text("another card")
    (folder / "sub").mkdir()
    (folder / "sub" / "key").symlink_to(tmp_path / "key")
    command("push", folder, "someone/small")
    assert not {".env", "sub/key"} & set(hub.uploaded) and "another card" not in hub.uploaded[CARD].decode()
    with pytest.raises(InputRefused, match="these are links"):
        push(folder, ["sub/key"], "someone/small", "", api=FakeApi())


def test_a_dry_run_asks_nothing_of_the_hub(artifact, hub):
    assert "# someone/small" in command("push", artifact, "someone/small", "--dry-run").stdout
    assert hub.asked == [] and hub.uploaded == {}


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (LocalTokenNotFoundError("no token"), UsageError, "nobody is logged in"),
        (RepositoryNotFoundError("401", response=response(401)), UsageError, "does not let you write"),
        (RepositoryNotFoundError("502", response=response(502)), ResourceError, "the hub refused"),
        (ConnectionError("no route"), ResourceError, "cannot be reached"),
        (HTTPError("timed out"), ResourceError, "cannot be reached"),
        (HFValidationError("bad"), UsageError, "no name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_said(error, kind, says, artifact):
    with pytest.raises(kind, match=says) as caught:
        push(artifact, ["fxc.json"], "someone/small", "", api=FakeApi(error=error))
    assert caught.value.hint


def test_names_formats_and_folders_that_are_none(artifact, hub, tmp_path):
    assert "no name of a repository" in command("push", artifact, "a/b/c", code=2).output
    assert "there is no format 'zip'" in command("push", artifact, "a/b", "--format", "zip", code=2).output
    assert "not an fxc artifact" in command("push", tmp_path, "a/b", code=3).output
    assert hub.uploaded == {}


def test_offline_is_said_before_anything_else(artifact, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="nothing is uploaded"):
        push(artifact, ["fxc.json"], "someone/small", "")


def test_the_fake_is_called_as_the_real_one_can_be():
    import inspect

    for name in ("create_repo", "list_repo_files", "upload_folder", "upload_file"):
        ours, real = (inspect.signature(getattr(each, name)).parameters for each in (FakeApi, HfApi))
        named = [p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY]
        assert set(named) <= set(real), name
    assert {"private", "repo_type", "exist_ok"} <= set(inspect.signature(HfApi.create_repo).parameters)


@pytest.mark.parametrize("kind", LOADING)
def test_what_a_report_says_is_no_markup(kind):
    name = "x|`</td><script>alert(1)</script>[a](b)\n# title"
    report = {
        "bytes_before": "many", "parameters_before": 4, "parameters_after": float("inf"), "coverage": True, "passes": [
            None, {"name": name, "changed": 3, "notes": [name, 4], "plugin": {"module": name}},
        ], "source": {"kind": "hub", "id": "org/model"},
    }  # fmt: skip
    hostile = report | {"source": {"kind": "hub", "id": "x](https://evil) y"}}
    assert "evil" not in card({"report": hostile}, {}, "a/b", kind, 1000)
    text = card({"report": report, "versions": {"fxc": name}}, {"class": name}, "a/b", kind, 1000)
    assert "<script>" not in text and "\n# title" not in text and "](b)" not in text.replace("\\](b)", "")
    assert 'base_model: "org/model"' in text and "| files here |  | 1.00 kB |  |" in text


def test_a_card_of_nothing_says_what_there_is():
    text = card({}, {}, "a/b", "artifact", 12)
    assert "| files here |  | 12 B |  |" in text and "| pass |" not in text
