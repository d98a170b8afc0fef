"""A file of measurements of one artifact, a JSON object a line, the oldest first: how far it has drifted from its original.

    {"fxc_history": 1, "time": "2026-01-31T03:00:00+00:00", "artifact": "<sha256>", "measure": "perplexity", "value": 6.40,
     "against": 6.38, "worse": 0.003, ...}

A line is written at once, under a lock, and is on the disk before anything else happens; one that cannot be written as a whole
leaves the file as it was.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

from fxc.errors import InputRefused, ResourceError, UsageError, first_line

VERSION = 1
_NUMBERS = ("value", "against", "worse")
_LONGEST = 64 * 2**20


def read(path: Path, artifact: str) -> list[dict[str, Any]]:
    """The lines of the history at `path`, [] where there is no file. artifact: the SHA-256 of the manifest of the artifact that
    it has to be of.

    Raises `InputRefused` for a line that is broken or of another artifact, `UsageError` for what is no file."""
    if path.exists() and not path.is_file():
        raise UsageError("the history is no file", where=path, hint="give the name of a file, as drift.jsonl")
    if not path.exists():
        return []
    try:
        if path.stat().st_size > _LONGEST:
            raise InputRefused("the history is too large", where=path, hint="begin a new one")
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused("this is no history", where=path, why=error, hint="give another file") from None
    except OSError as error:
        raise ResourceError(f"could not be read: {error.strerror}", where=path, hint="check its permissions") from error
    lines = text.split("\n")
    if lines.pop():
        raise _broken(path, len(lines) + 1, "it does not end: whoever wrote it was stopped")
    return [_entry(path, number, line, artifact) for number, line in enumerate(lines, 1)]


def _entry(path: Path, number: int, line: str, artifact: str) -> dict[str, Any]:
    try:
        entry = json.loads(line, parse_constant=_no_number)
        is_dated = datetime.fromisoformat(entry["time"]).tzinfo is not None
        is_whole = is_dated and entry["fxc_history"] == VERSION and isinstance(entry["measure"], str)
        is_whole = is_whole and all(math.isfinite(entry[name]) for name in _NUMBERS)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _broken(path, number, first_line(error)) from None
    if not is_whole:
        raise _broken(path, number, "it is not what this version of fxc writes")
    if entry.get("artifact") != artifact:
        raise InputRefused(
            "the history is of another artifact",
            where=f"{path}, line {number}",
            why=f"it says {str(entry.get('artifact'))[:12]}, and this one is {artifact[:12]}",
            hint="give each artifact a file of its own; one that was compiled again is another",
        )
    return entry


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _broken(path: Path, number: int, why: str) -> InputRefused:
    return InputRefused("the line is broken", where=f"{path}, line {number}", why=why, hint="delete the line")


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line. Raises `ResourceError` where it could not be written as a whole; the file is then as it was."""
    content = (json.dumps(entry, allow_nan=False, sort_keys=True) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = os.fstat(handle)
            if not stat.S_ISREG(before.st_mode):
                raise UsageError("the history is no file", where=path, hint="give the name of a file, as drift.jsonl")
            try:
                if os.write(handle, content) != len(content):
                    raise OSError("the disk is full")
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, before.st_size)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise ResourceError(
            f"the line could not be written: {error.strerror or error}",
            where=path,
            hint="free some space, or give a file that you may write to; the history is as it was",
        ) from error
