"""A folder that is written as a whole or not at all.

It is filled beside its target under a name of its own, synced to the disk, and renamed. A run that is killed,
interrupted or out of disk space leaves the old folder, or none. Two writers of one target exclude each other with a
lock on a file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxc.errors import ResourceError, UsageError

# Directories, headers and the file system's own blocks, over the bytes that the files hold.
SLACK = 1_000_000
# What a network file system says where nothing can be locked.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def staged(
    out: Path, *, nbytes: int, source: Path | None = None, may_replace: Callable[[Path], str | None] | None = None
) -> Iterator[Path]:
    """An empty folder to fill; when the block ends it takes the place of `out`, and when the block raises it goes away.

    nbytes: how much is going to be written. source: what `out` must not be, hold or lie in. may_replace: says why an
    existing `out` that is not empty must stay, or None when it may go; without it such an `out` always stays.

    Raises `UsageError` where `out` cannot be the target and `ResourceError` where the machine does not permit it: disk
    full, no permission, another writer.
    """
    try:
        out = out.resolve()
        _check_target(out, source)
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _recover(out)
            _check_replaceable(out, may_replace)
            _check_space(out.parent, nbytes)
            folder = _beside(out, "tmp")
            try:
                folder.mkdir()
                yield folder
                _open_to_others(folder)
                _sync(folder)
                _check_replaceable(out, may_replace)
                _put_in_place(folder, out)
            finally:
                if folder.exists():
                    shutil.rmtree(folder)
    except OSError as error:
        raise resource_error(error, out) from error


def resource_error(error: OSError, out: Path) -> ResourceError:
    """What the operating system refused, as an error with a next step."""
    hints = {
        errno.ENOSPC: "free some space or write to another disk",
        errno.EDQUOT: "free some space within your quota or write to another disk",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write smaller shards",
        errno.EACCES: "write to a folder that you own, or change its permissions",
        errno.EPERM: "write to a folder that you own, or change its permissions",
        errno.EROFS: "the file system is read-only: write to another one",
        errno.ENAMETOOLONG: "give a shorter name",
    } | dict.fromkeys(_WITHOUT_LOCKS, "the file system has no locks: write to a local disk, and copy the folder")
    hint = hints.get(error.errno, "check that the disk is there and that you may write to it")
    return ResourceError(
        f"could not be written: {error.strerror or error}",
        where=out,
        why=f"at {error.filename}" if error.filename else None,
        hint=f"{hint}; what was there before is unchanged",
    )


@contextmanager
def on_disk(out: Path) -> Iterator[None]:
    """Whatever the operating system refuses in it is a `ResourceError`."""
    try:
        yield
    except OSError as error:
        raise resource_error(error, out) from error


def check_target(
    out: Path,
    source: Path | None = None,
    may_replace: Callable[[Path], str | None] | None = None,
    nbytes: int = 0,
) -> None:
    """Raise the error that `staged` would for the same arguments, before any work is done. Writes nothing that stays."""
    try:
        out = out.resolve()
        _check_target(out, source)
        _check_replaceable(out, may_replace)
        place = check_writable(out)
    except OSError as error:
        raise resource_error(error, out) from error
    _check_space(place, nbytes)


def check_writable(folder: Path) -> Path:
    """The folder that exists and that `folder` is going to be made in. Raises `UsageError` where a file is in the way and
    `ResourceError` where nothing can be made there."""
    folder = folder.absolute()
    try:
        place = next(parent for parent in folder.parents if parent.exists())
        if not place.is_dir():
            raise UsageError("a file is in the way of the output", where=folder, why=place, hint="give another folder")
        probe = place / folder.relative_to(place).parts[0]
        probe = _beside(probe, "try")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise resource_error(error, folder) from error
    return place


def _check_target(out: Path, source: Path | None) -> None:
    what = None
    if source is not None:
        origin = Path(source).resolve()
        if out == origin:
            what = "the output is the source"
        elif out.is_relative_to(origin):
            what = f"the output lies inside of the source, {origin}"
        elif origin.is_relative_to(out):
            what = f"the source, {origin}, lies inside of the output"
    if not out.name or Path.cwd().is_relative_to(out):
        what = "the output is the current folder or one that holds it, and an output is replaced as a whole"
    elif out.exists() and not out.is_dir():
        what = "the output is a file"
    if what:
        raise UsageError(what, where=out, hint="give another folder")


def _check_replaceable(out: Path, may_replace: Callable[[Path], str | None] | None) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if may_replace is None:
        hint = "give another folder, or pass overwrite=True (--overwrite) to replace an artifact"
        raise UsageError("the output exists and is not empty", where=out, hint=hint)
    if reason := may_replace(out):
        hint = "give another folder, or remove this one yourself"
        raise UsageError("the output will not be replaced", where=out, why=reason, hint=hint)


def _check_space(parent: Path, nbytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < nbytes + SLACK:
        raise ResourceError(
            "there is not enough space on the disk",
            where=parent,
            why=f"{nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            hint="free some space or write to another disk; what was there before is unchanged",
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """No other process writes `out` in the meantime. Raises `ResourceError` where one does."""
    path = out.with_name(out.name + ".lock")
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except BlockingIOError:
            os.close(handle)
            raise ResourceError(
                "another process is writing this output",
                where=out,
                why=f"it holds the lock on {path}",
                hint="wait until it is done, or give another folder",
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before us removed this file: lock the one that is there now
    try:
        yield
    finally:
        # Somebody's own file may bear this name (poetry and poetry.lock); ours is empty.
        if os.fstat(handle).st_size == 0:
            path.unlink(missing_ok=True)
        os.close(handle)


def _beside(out: Path, kind: str, owner: int | str | None = None) -> Path:
    return out.with_name(f".{out.name}.fxc-{kind}-{os.getpid() if owner is None else owner}")


def _recover(out: Path) -> None:
    """Undo what a killed run left: put back the folder that it had moved aside, remove what it had not finished.
    Whoever holds the lock knows that no other writer is at work here."""
    prefix = _beside(out, "old", "").name
    for old in sorted(p for p in out.parent.iterdir() if p.name.startswith(prefix)):
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)
    prefix = _beside(out, "tmp", "").name
    for leftover in sorted(p for p in out.parent.iterdir() if p.name.startswith(prefix)):
        shutil.rmtree(leftover)


def _open_to_others(folder: Path) -> None:
    """Give every file the permissions of a new one, whatever made it: safetensors keeps its files to their owner."""
    probe = folder / ".fxc-mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o777)


def write_file(path: Path, content: bytes) -> None:
    """Write one file as a whole, or leave what was there. Raises `ResourceError` where the machine does not permit it."""
    aside = _beside(path, "tmp")
    try:
        try:
            aside.write_bytes(content)
            sync(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise resource_error(error, path) from error


def _sync(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        sync(path)


def digest_of_file(path: Path) -> str:
    """The SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(folder: Path, out: Path) -> None:
    old = _beside(out, "old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
        sync(out.parent)
    except BaseException:
        if not folder.exists():
            out.rename(folder)
        if old.exists():
            old.rename(out)
        raise
    # The new folder is in place and synced. What cannot be removed of the old one, the next save tries again.
    shutil.rmtree(old, ignore_errors=True)
