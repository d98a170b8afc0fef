"""The history of an artifact: lines that are whole or not there, and what is refused."""

import errno
import json
import os
from multiprocessing import get_context

import pytest

from fxc.errors import InputRefused, ResourceError, UsageError
from fxc.measure import history

ENTRY = {
    "fxc_history": 1, "time": "2026-01-31T03:00:00+00:00", "artifact": "aa", "measure": "perplexity", "value": 6.5,
    "against": 6.0, "worse": 0.08,
}  # fmt: skip


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "h.jsonl"
    assert history.read(path, "aa") == []
    for value in (1.0, 2.0):
        history.append(path, ENTRY | {"value": value})
    assert [each["value"] for each in history.read(path, "aa")] == [1.0, 2.0] and path.read_text().count("\n") == 2


@pytest.mark.parametrize(
    "line",
    ["", "{", "3", "[]", '{"time": 3}', json.dumps(ENTRY | {"value": "x"}), json.dumps(ENTRY | {"worse": None}),
     json.dumps(ENTRY | {"time": "2026-01-31"}), json.dumps(ENTRY | {"time": "soon"}), json.dumps(ENTRY | {"fxc_history": 2}),
     json.dumps(ENTRY | {"value": float("nan")}), json.dumps(ENTRY | {"value": 10**400}), "[" * 100_000],
)  # fmt: skip
def test_a_broken_line_is_named(line, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(ENTRY) + "\n" + line + "\n")
    with pytest.raises(InputRefused, match="line is broken") as caught:
        history.read(path, "aa")
    assert caught.value.where.endswith("line 2") and "delete" in caught.value.hint


def test_a_line_without_an_end_and_what_is_no_history(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(ENTRY) + "\n" + json.dumps(ENTRY))
    with pytest.raises(InputRefused, match="broken") as caught:
        history.read(path, "aa")
    assert caught.value.where.endswith("line 2")
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputRefused, match="no history"):
        history.read(path, "aa")
    with pytest.raises(UsageError, match="no file"):
        history.read(tmp_path, "aa")


def test_a_history_of_another_artifact(tmp_path):
    history.append(tmp_path / "h.jsonl", ENTRY)
    with pytest.raises(InputRefused, match="another artifact") as caught:
        history.read(tmp_path / "h.jsonl", "bb")
    assert "file of its own" in caught.value.hint


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "h.jsonl"
    history.append(path, ENTRY)
    before, write = path.read_bytes(), os.write

    def half(handle, content):
        return write(handle, content[: len(content) // 2])

    def full(handle, content):
        write(handle, content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in (half, full):
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(ResourceError, match="could not be written") as caught:
            history.append(path, ENTRY)
        assert path.read_bytes() == before and "as it was" in caught.value.hint


def _append_many(path, number):
    for _ in range(25):
        history.append(path, ENTRY | {"value": float(number), "filling": "x" * 5000})


def test_several_writers_mix_no_lines(tmp_path):
    path = tmp_path / "h.jsonl"
    workers = [get_context("fork").Process(target=_append_many, args=(path, number)) for number in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert len(history.read(path, "aa")) == 75
