"""A disk that is full at any write, writers that die, eight at once, a file system without locks: the old output or the new."""

import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path

import pytest
from artifacts import bytes_of, net

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import staging, store
from fxc.errors import ResourceError

# What a save asks of the operating system, by the Python function that asks.
CALLS = [
    (store, "write_shard"), (Path, "write_bytes"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (Path, "touch"),
    (Path, "chmod"), (os, "fsync"), (os, "open"), (os, "replace"), (shutil, "copyfile"),
]  # fmt: skip


def full_at(number: int, patch: pytest.MonkeyPatch, error: OSError) -> list[str]:
    """The call of this number fails, after it wrote half of what it should; the names of all calls so far."""
    made: list[str] = []

    def failing(name, true):
        def call(*arguments, **options):
            made.append(name)
            if len(made) == number:
                if name == "write_bytes":
                    true(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise error
            return true(*arguments, **options)

        return call

    for owner, name in CALLS:
        patch.setattr(owner, name, failing(name, getattr(owner, name)))
    return made


@pytest.mark.fault(26)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_is_full_at_any_write(code, saved, tmp_path):
    before, number, names = bytes_of(saved), 0, set()
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            made = full_at(number, patch, OSError(code, os.strerror(code)))
            failed = False
            try:
                store.save(net(), saved, manifest={"new": True}, overwrite=True)
            except ResourceError as error:
                failed = True
                assert str(saved) in str(error) and "try: " in str(error)
            names.update(made)
            if len(made) < number:
                break
        found = store.read(saved).manifest
        said = f"call {number}, {made[number - 1]}"
        assert ("new" in found) == (bytes_of(saved) != before) == (not failed), said
        if not failed:
            # What could not be removed of the old output, the next save removes.
            files = {"config.json": b'{"a": 1}\n'}
            store.save(net(), saved, manifest={"report": {"passes": ["int8"]}}, extra_files=files, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["out"], said
    assert number > 10 and {"write_shard", "fsync", "rename", "mkdir", "open"} <= names


def child(work) -> int:
    made = os.fork()
    if made == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return made


@pytest.mark.fault(29)
def test_the_lock_of_a_process_that_died_holds_nobody_up(tmp_path):
    out = tmp_path / "out"

    def dies() -> int:
        with staging.staged(out, nbytes=0) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    os.waitpid(child(dies), 0)
    assert (tmp_path / "out.lock").exists() and not out.exists()
    store.save(net(), out, manifest={})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    store.read(out)


@pytest.mark.fault(29)
def test_eight_processes_write_one_output(tmp_path):
    out = tmp_path / "out"
    for _ in range(3):

        def writes(number: int) -> int:
            try:
                store.save(net(), out, manifest={"who": number}, overwrite=True)
            except ResourceError as error:
                return 6 if "another process" in str(error) else 1
            return 0

        children = [child(lambda number=number: writes(number)) for number in range(8)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]
        assert set(codes) <= {0, 6} and 0 in codes, codes
        assert codes[store.read(out).manifest["who"]] == 0
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(29)
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(code, saved, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    before = bytes_of(saved)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ResourceError, match="local disk"):
        store.save(net(), saved, manifest={}, overwrite=True)
    assert bytes_of(saved) == before


@pytest.mark.fault(26)
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "place").mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="permission"):
        store.save(net(), tmp_path / "place" / "out", manifest={})
