"""What passes write of a model that is read piece by piece: found by the same run, by no other, and only if it is whole."""

import errno
import json

import pytest
import torch

from fxc.artifact.spill import JOURNAL, Spill
from fxc.errors import ResourceError

KEY = {"passes": ["int8"]}


def written(folder, key=KEY):
    spill = Spill(folder, key)
    spill.write({"b.q": torch.arange(4), "b.scale": torch.ones(1)})
    spill.write({"a.q": torch.arange(5)})
    return spill


def names(spill):
    return list(spill.saved(lambda name: True))


def test_tensors_come_back_mapped_and_in_order(tmp_path):
    spill = Spill(tmp_path, KEY)
    made = spill.write({"b": torch.arange(4), "a": torch.ones(2, 3).t()})
    assert list(made) == ["b", "a"] and torch.equal(made["a"], torch.ones(3, 2)) and torch.equal(made["b"], torch.arange(4))
    assert [path.name for path in spill.parts] == ["part-00000.safetensors"]


def test_the_same_run_finds_what_was_written_and_another_does_not(tmp_path):
    written(tmp_path)
    assert names(Spill(tmp_path, {"passes": ["int4"]})) == []
    again = Spill(tmp_path, KEY)
    found = again.saved(lambda name: name.startswith("b."))
    assert list(found) == ["b.q", "b.scale"] and torch.equal(found["b.q"], torch.arange(4))
    assert names(again) == ["a.q"]
    again.write({"c": torch.ones(1)})
    assert [path.name for path in again.parts] == [f"part-0000{n}.safetensors" for n in range(3)]
    assert names(Spill(tmp_path, KEY)) == ["b.q", "b.scale", "a.q", "c"]


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "journal"])
def test_what_is_not_whole_is_not_there(tmp_path, damage):
    folder = written(tmp_path).folder
    first, second = sorted(folder.glob("part-*"))
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-1])
    elif damage == "other":
        second.write_bytes(second.read_bytes()[:-1] + b"\1")
    elif damage == "gone":
        second.unlink()
    else:
        lines = (folder / JOURNAL).read_text().splitlines()
        (folder / JOURNAL).write_text("\n".join(lines[:2]) + '\n{"file": "part-0')
    again = Spill(tmp_path, KEY)
    assert names(again) == ["b.q", "b.scale"]
    assert sorted(folder.glob("part-*")) == [first]


def test_a_first_part_that_is_damaged_leaves_nothing(tmp_path):
    folder = written(tmp_path).folder
    (folder / "part-00000.safetensors").write_bytes(b"")
    assert names(Spill(tmp_path, KEY)) == [] and list(folder.glob("part-*")) == []


def test_what_an_earlier_run_went_on_to_is_overwritten(tmp_path):
    written(tmp_path)
    again = Spill(tmp_path, KEY)
    again.saved(lambda name: name.startswith("b."))
    again.write({"other": torch.ones(2)})
    assert names(again) == [] and names(Spill(tmp_path, KEY)) == ["b.q", "b.scale", "other"]


def test_half_written_files_go(tmp_path):
    folder = written(tmp_path).folder
    (folder / "part-00002.tmp").write_bytes(b"half")
    Spill(tmp_path, KEY)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.fault(26)
def test_a_disk_that_takes_nothing_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    spill = Spill(tmp_path, KEY)
    monkeypatch.setattr("fxc.artifact.spill.write_shard", full)
    with pytest.raises(ResourceError, match="could not be written: No space"):
        spill.write({"a": torch.ones(1)})
    assert json.loads((spill.folder / JOURNAL).read_text().splitlines()[0])["key"]
