"""The manifest: what it says, and that nothing beside it counts."""

import hashlib
import json

import pytest
import torch
from artifacts import bytes_of, refusal

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import manifest, store


def test_the_manifest_says_versions_hashes_and_what_the_caller_says(saved):
    found = store.read(saved)
    content = found.manifest
    assert found.path == saved and store.is_artifact(saved) and not store.is_artifact(saved.parent)
    assert content["format_version"] == 1 and content["report"] == {"passes": ["int8"]}
    assert content["versions"]["torch"] == torch.__version__
    data = (saved / "program.fxc").read_bytes()
    assert content["files"]["program.fxc"] == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert content["files"].keys() == bytes_of(saved).keys() - {"fxc.json"}


def test_white_space_in_the_manifest_is_a_change_as_well(saved):
    data = (saved / "fxc.json").read_bytes()
    (saved / "fxc.json").write_bytes(data.replace(b": ", b":\t", 1))
    refusal(saved, "fxc.json", "its own hash")


@pytest.mark.fault(32)
def test_a_newer_format_is_refused_with_the_version(saved):
    content = json.loads((saved / "fxc.json").read_bytes())
    content["format_version"], content["versions"]["fxc"] = 3, "9.9"
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    refusal(saved, "format 3", "9.9", "upgrade")


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname", "C:\\x", "\\\\host\\x", "a/../../b", "x\x1b[31m"])
def test_a_manifest_cannot_name_files_outside(name, saved):
    content = json.loads((saved / "fxc.json").read_bytes())
    content["files"][name] = {"sha256": "0" * 64, "size": 0}
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    error = refusal(saved, "leads out of")
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("files", [None, [], {}, {"program.fxc": None}, {"program.fxc": {"sha256": 1, "size": 1}},
                                   {"program.fxc": {"sha256": "0" * 64, "size": "1"}}])  # fmt: skip
def test_a_manifest_without_its_list(files, saved):
    content = {**json.loads((saved / "fxc.json").read_bytes()), "files": files}
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    refusal(saved)


def test_files_that_a_loader_would_read_have_to_be_listed(saved):
    (saved / "README.md").write_text("what this is")
    store.read(saved)
    (saved / "tokenizer.json").write_text("{}")
    refusal(saved, "tokenizer.json", "does not list")
