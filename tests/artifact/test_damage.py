"""Artifacts that are damaged, or changed on purpose and given the hashes that fit: each is refused with one error."""

import json
from pathlib import Path

import pytest
import torch
from artifacts import INDEX, SHARD, bytes_of, constants, first, refusal, rehash
from safetensors.torch import load_file, save_file

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import store
from fxc.errors import InputRefused

FILES = ["program.fxc", "fxc.json", SHARD, INDEX, "config.json"]


@pytest.mark.fault(22)
@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found_wherever_it_is(name, flip, saved):
    data = (saved / name).read_bytes()
    for position in {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
        changed = bytearray(data)
        changed[position] ^= flip
        (saved / name).write_bytes(changed)
        refusal(saved)


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", FILES)
def test_a_cut_missing_or_longer_file_is_named(name, saved):
    data = (saved / name).read_bytes()
    for left in (0, 1, len(data) // 2, len(data) - 1):
        (saved / name).write_bytes(data[:left])
        refusal(saved, name)
    (saved / name).write_bytes(data + b" ")
    refusal(saved, name)
    (saved / name).unlink()
    refusal(saved, *([] if name == "fxc.json" else [name, "missing"]))


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["../out/" + SHARD, "/x.safetensors", "model.bin", "other.safetensors", 3, None, []])
def test_an_index_cannot_name_other_files(name, saved):
    index = json.loads((saved / INDEX).read_bytes())
    index["weight_map"]["mask"] = name
    (saved / INDEX).write_text(json.dumps(index))
    rehash(saved)
    refusal(saved, INDEX)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"", b'{"weight_map": {}, "metadata": {}}', b"[" * 100_000, b"\xff"])
def test_an_index_that_is_none(content, saved):
    (saved / INDEX).write_bytes(content)
    rehash(saved)
    refusal(saved, INDEX)


@pytest.mark.parametrize("name", ["program.fxc", "fxc.json", SHARD, "config.json"])
def test_a_link_out_of_the_artifact_is_not_followed(name, saved, tmp_path):
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    refusal(saved, name, "link")


@pytest.mark.fault(21)
def test_the_links_of_the_hugging_face_cache_are_followed(saved, tmp_path):
    repo = tmp_path / "models--me--net"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in bytes_of(saved):
        (saved / name).rename(repo / "blobs" / name)
        (snapshot / name).symlink_to(repo / "blobs" / name)
    store.read(snapshot)


def test_huge_files_are_refused_before_they_are_read(saved, monkeypatch):
    monkeypatch.setattr("fxc.safety.JSON_LIMIT", 600)
    refusal(saved, "bytes", "program.fxc" if (saved / "fxc.json").stat().st_size <= 600 else "fxc.json")


def change_weights(folder: Path, **changes: object) -> None:
    tensors = load_file(folder / SHARD)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name)) if callable(value) else value
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(tensors, SHARD)
    (folder / INDEX).write_text(json.dumps(index))
    rehash(folder)


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"up__scale": first(torch.nan)}, ["up.scale", "NaN"]),
        ({"up__scale": first(torch.inf)}, ["up.scale", "Inf"]),
        ({"up__scale": first(0.0)}, ["up.scale", "not positive"]),
        ({"up__scale": first(-1.0)}, ["up.scale", "not positive"]),
        ({"down__weight": first(torch.nan)}, ["down.weight", "NaN"]),
        ({"down__weight": first(-torch.inf)}, ["down.weight", "Inf"]),
        ({"mask": first(torch.nan)}, ["mask", "NaN"]),
        ({"up__qweight": torch.zeros(4, 6, dtype=torch.int8)}, ["up.qweight", "i8[6, 4]", "i8[4, 6]", "line 8"]),
        ({"up__qweight": torch.zeros(6, 4)}, ["up.qweight", "f32[6, 4]"]),
        ({"up__qweight": torch.zeros(6, 4, dtype=torch.uint16)}, ["up.qweight", "uint16"]),
        ({"up__scale": None}, ["up.scale", "do not have it"]),
        ({"other": torch.zeros(1)}, ["other", "does not declare it"]),
    ],
)  # fmt: skip
def test_constants_that_do_not_fit_or_are_no_numbers(changes, words, saved):
    change_weights(saved, **changes)
    refusal(saved, *words)


def test_shard_and_index_that_disagree(saved):
    index = json.loads((saved / INDEX).read_text())
    del index["weight_map"]["mask"]
    (saved / INDEX).write_text(json.dumps(index))
    rehash(saved)
    refusal(saved, SHARD, "mask")


def test_no_changed_header_of_weights_gets_through_or_ends_in_a_traceback(saved):
    data = (saved / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    expected = {k: (v.shape, v.dtype) for k, v in constants().items()}
    for position in range(8 + length):
        changed = bytearray(data)
        changed[position] ^= 0x02 if position % 2 else 0x11
        (saved / SHARD).write_bytes(changed)
        rehash(saved)
        try:
            found = store.read(saved).program.constants
        except InputRefused:
            continue
        # White space for white space, or the same tensors' bytes under their own names.
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == expected


def change_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "program.fxc").read_text()
    assert old in text
    (folder / "program.fxc").write_bytes(text.replace(old, new).encode("utf-8", "surrogatepass"))
    rehash(folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("aten.maximum", "aten.from_file", ["line 14", "from_file"]),
        ("aten.maximum", "os.system", ["line 14", "os.system"]),
        ('return "out" %3\n', "", ["ends before"]),
        ("f32[s0, 4] = aten.linear", "f32[s0, 5] = aten.linear", ["line 13", "f32[s0, 5]", "f32[s0, 4]"]),
        ("  # down", "", []),  # nothing changes but a comment: only the hash of the file can tell
        ("%3: f32", "%3:  f32", ["line 14"]),
        ("@mask)", "@mask )", ["line 14"]),
        ('"Net"', '"Nét"', ["characters"]),
        ("symbol s0 = 2", "symbol s0 = 3\nsymbol s1 = 4", ["line 6"]),
        ("\n", "\r\n", ["line 1"]),
    ],
)  # fmt: skip
def test_texts_that_fxc_did_not_write(old, new, words, saved):
    change_text(saved, old, new)
    if words:
        refusal(saved, "program.fxc", *words)
    else:
        store.read(saved)
