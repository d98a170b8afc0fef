"""fxc.json: what an artifact says of itself, and the size and hash of each of its files.

The manifest holds its own hash as well, and there is one way to write it, so that any changed byte shows. This finds
accidents. Whoever changes a file on purpose can write the hashes too, so that nothing here makes a file trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from fxc.artifact.companions import has_vocabulary, is_added_tokenizer
from fxc.artifact.staging import digest_of_file
from fxc.errors import InputRefused, UsageError
from fxc.safety import check_contained, check_files, check_relative_name, listed, read_json

FORMAT, CODED_FORMAT = 1, 2
"""What is written: artifacts with coded constants are of a later format, so that what cannot read them says so."""
MANIFEST = "fxc.json"
PAGE = "report.html"
"""What people read of an artifact. No manifest lists it: nothing depends on it, and it may be written again or deleted."""
DAMAGED = "the artifact was damaged or changed: copy it again or compile the model again"
_OWN_KEYS = ("format", "format_version", "versions", "files", "coded", "sha256")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
# transformers and fxc read files of these kinds when they find them, so that each of them has to be in the manifest.
_READ_WHEN_THERE = {".json", ".safetensors", ".fxc", ".txt", ".model", ".jinja", ".spm", ".py"}


def new_manifest(own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with format and versions. Raises `UsageError` unless it is JSON (finite numbers only) under free keys."""
    if taken := sorted(set(own) & set(_OWN_KEYS)):
        raise UsageError(f"the manifest's key {taken[0]!r} is fxc's own", where="manifest", hint="use another key")
    try:
        plain = json.loads(json.dumps(dict(own), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            "the manifest is not JSON", where="manifest", why=error, hint="use strings, finite numbers, lists and dicts"
        ) from None
    return {**plain, "format": "fxc", "format_version": FORMAT, "versions": versions()}


def versions() -> dict[str, str]:
    """Of what the bytes of an artifact depend on."""
    return {name: metadata.version(name) for name in ("fxc", "torch", "transformers")}


def encode(content: Mapping[str, Any]) -> bytes:
    """The only bytes that say `content`, with the hash of the rest under "sha256"."""
    plain = {k: v for k, v in content.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**plain, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def describe(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Relative name -> {sha256, size} of every file in `folder`. known: the SHA-256 that some of them have to have."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    others = [name for name in files if name not in (known or {})]
    digests = {**(known or {}), **dict(zip(others, _digests([files[name] for name in others]), strict=True))}
    return {name: {"sha256": digests[name], "size": path.stat().st_size} for name, path in files.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the artifact `path`, intact and well formed; the files that it lists have not been looked at."""
    where = path / MANIFEST
    if not where.is_file():
        hint = "'fxc compile MODEL -o DIR' writes one"
        raise InputRefused(f"this is not an fxc artifact: it has no {MANIFEST}", where=path, hint=hint)
    check_contained(path, where)
    content = read_json(where)
    version = content.get("format_version")
    if content.get("format") != "fxc" or type(version) is not int or version < 1:
        raise InputRefused("this is not the manifest of an artifact", where=where, hint=DAMAGED)
    if version > CODED_FORMAT:
        versions = content.get("versions")
        raise InputRefused(
            f"the artifact has format {version}, and this version of fxc reads up to {CODED_FORMAT}",
            where=where,
            why=f"it was written by fxc {str(versions.get('fxc'))[:40]}" if isinstance(versions, dict) else None,
            hint="upgrade fxc (pip install -U fxc)",
        )
    if where.read_bytes() != encode(content):
        raise InputRefused("the file does not match its own hash", where=where, hint=DAMAGED)
    files = content.get("files")
    if not isinstance(files, dict):
        raise InputRefused("the manifest does not say which files there are", where=where, hint=DAMAGED)
    for name, entry in files.items():
        check_relative_name(name, where=where)
        digest, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(digest, str) or not _DIGEST.match(digest) or type(size) is not int:
            raise InputRefused(f"the manifest has no hash and size of {name}", where=where, hint=DAMAGED)
    return content


def check_listed(path: Path, files: dict[str, dict[str, Any]], known: Collection[str] = ()) -> None:
    """Each file is there, in the folder, with the size and the hash that the manifest says, and there is no other one
    that a loader would read, but for a tokenizer that was put there afterwards. known: those whose hashes were looked at."""
    check_files(path)
    for name, entry in files.items():
        _check_size(path, name, entry)
    readable = {p.name for p in path.iterdir() if p.suffix in _READ_WHEN_THERE and p.is_file()}
    others = readable - files.keys() - {MANIFEST}
    if others and (has_vocabulary(files) or not is_added_tokenizer(path, others)):
        raise InputRefused(
            "there are files that the manifest does not list",
            where=path,
            why=listed(others),
            hint="move them away: a loader would read them as if they were the model's",
        )
    others = [name for name in files if name not in known]
    for name, digest in zip(others, _digests([path / name for name in others]), strict=True):
        _check_digest(path / name, digest, files[name])


def check_file(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Of `check_listed` what is about one file."""
    _check_size(path, name, entry)
    _check_digest(path / name, _digests([path / name])[0], entry)


def _check_size(path: Path, name: str, entry: dict[str, Any]) -> None:
    file = path / name
    check_contained(path, file)
    if not file.is_file():
        raise InputRefused("the file is missing", where=file, why=f"{MANIFEST} lists it", hint=DAMAGED)
    size, expected = file.stat().st_size, entry["size"]
    if size != expected:
        left = "bytes left over at the end"
        what = f"truncated: {expected - size:,} bytes are missing" if size < expected else left
        raise InputRefused(what, where=file, why=f"it has {size:,} bytes, not {expected:,}", hint=DAMAGED)


def _check_digest(file: Path, digest: str, entry: dict[str, Any]) -> None:
    if digest != entry["sha256"]:
        raise InputRefused("the file does not match its hash", where=file, why=f"{MANIFEST} says another one", hint=DAMAGED)


def replaceable(folder: Path) -> str | None:
    """Why `folder` must not be replaced, or None: it has to be an artifact and to hold nothing but its own files."""
    try:
        names = {*read_manifest(folder)["files"], MANIFEST, PAGE}
    except InputRefused as error:
        return error.what
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return f"it holds files that fxc did not write: {listed(present - names)}" if present - names else None


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # hashing a large block releases the interpreter's lock
        return list(pool.map(digest_of_file, paths))
