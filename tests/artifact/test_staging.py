"""Writing an artifact: whatever fails or is killed leaves what was there before."""

import errno
import fcntl
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from artifacts import NET, bytes_of, constants, net

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import staging, store
from fxc.errors import ResourceError, UsageError
from fxc.ir import parse_program


@pytest.mark.fault(25)
def test_an_existing_output_is_replaced_only_when_asked_and_only_if_it_is_an_artifact(saved, tmp_path):
    with pytest.raises(UsageError, match="not empty"):
        store.save(net(), saved, manifest={})
    store.save(net(), saved, manifest={"new": True}, overwrite=True)
    assert store.read(saved).manifest["new"] is True and not (saved / "config.json").exists()

    (saved / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        store.save(net(), saved, manifest={}, overwrite=True)
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "letters" / "one").write_text("dear")
    for content in (None, "{}"):
        if content:
            (home / "fxc.json").write_text(content)
        with pytest.raises(UsageError, match="will not be replaced"):
            store.save(net(), home, manifest={}, overwrite=True)
    assert (home / "letters" / "one").read_text() == "dear"

    (tmp_path / "empty").mkdir()
    store.save(net(), tmp_path / "empty", manifest={})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        store.save(net(), tmp_path / "file", manifest={}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "home", "out"]


@pytest.mark.fault(25)
def test_the_output_cannot_touch_the_source(saved, tmp_path, monkeypatch):
    before = bytes_of(saved)
    (tmp_path / "link").symlink_to(saved)
    for out in (saved, tmp_path / "link", saved / "inside", tmp_path):
        with pytest.raises(UsageError, match="source"):
            store.save(net(), out, manifest={}, source=saved, overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder"):
        store.save(net(), ".", manifest={})
    assert bytes_of(saved) == before


@pytest.mark.fault(26)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "no"),
                                   KeyboardInterrupt(), MemoryError()])  # fmt: skip
@pytest.mark.parametrize("where", ["store.write_shard", "store.describe", "store.read", "staging.sync",
                                   "staging._put_in_place"])  # fmt: skip
def test_whatever_fails_leaves_the_old_output_as_it_was(error, where, saved, tmp_path, monkeypatch):
    before = bytes_of(saved)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"fxc.artifact.{where}", fail)
        with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)) as caught:
            store.save(net(), saved, manifest={"new": True}, overwrite=True)
        with pytest.raises((ResourceError, type(error))):
            store.save(net(), tmp_path / "fresh", manifest={})
    if isinstance(error, OSError):
        assert str(saved) in str(caught.value) and "try: " in str(caught.value)
    assert bytes_of(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    store.read(saved)


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_is_undone(call, saved, tmp_path, monkeypatch):
    before, rename, calls = bytes_of(saved), Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="Input/output"):
        store.save(net(), saved, manifest={"new": True}, overwrite=True)
    assert bytes_of(saved) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(26)
def test_a_real_limit_on_file_size(saved, tmp_path):
    big = parse_program(NET.replace("f32[4]", "f32[50000, 4]").replace("%3: f32[s0, 4]", "%3: f32[50000, 4]")
                        .replace("aten.maximum(%2, @mask)", "aten.maximum(@mask, @mask)").replace("(%1, @", "(%1, @"),
                        {**constants(), "mask": torch.zeros(50_000, 4)})  # fmt: skip
    before, limits = bytes_of(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="could not be written"):
            store.save(big, saved, manifest={}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(saved) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(26)
def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(store, "write_shard", None)
    with pytest.raises(ResourceError, match="not enough space"):
        store.save(net(), tmp_path / "out", manifest={})
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(27)
@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("fsync", 4), ("rename", 1), ("rename", 2), ("rmtree", 1)])
def test_a_killed_run_leaves_the_old_output_or_none_and_the_next_one_cleans_up(name, call, saved, tmp_path):
    child = os.fork()
    if child == 0:
        owner = {"fsync": os, "rename": Path, "rmtree": shutil}[name]
        original, calls = getattr(owner, name), []

        def killing(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killing)
        try:
            store.save(net(), saved, manifest={"new": True}, overwrite=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if (name, call) != ("rename", 2):
        assert ("new" in store.read(saved).manifest) == (name == "rmtree")
    else:
        assert not saved.exists()
    with pytest.raises(UsageError, match="not empty"):  # what was moved aside is back
        store.save(net(), saved, manifest={})
    store.read(saved)
    store.save(net(), saved, manifest={"newer": True}, overwrite=True)
    assert store.read(saved).manifest["newer"] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(29)
def test_two_writers_exclude_each_other(tmp_path):
    out = tmp_path / "out"
    with staging.staged(out, nbytes=0) as folder:
        (folder / "x").write_text("first")
        with pytest.raises(ResourceError, match="another process is writing"):
            store.save(net(), out, manifest={})
        store.save(net(), tmp_path / "other", manifest={})
    assert (out / "x").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_file_that_happens_to_be_named_like_the_lock_stays(tmp_path):
    (tmp_path / "out.lock").write_text("versions of packages")
    store.save(net(), tmp_path / "out", manifest={})
    assert (tmp_path / "out.lock").read_text() == "versions of packages"
    with (tmp_path / "out.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process"):
            store.save(net(), tmp_path / "out", manifest={}, overwrite=True)
