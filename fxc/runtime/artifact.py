"""The folder that a compiled model is: the text of its program, its constants, and a manifest of both.

    out/  program.fxc                           fxc.ir.text
          model-00001-of-0000N.safetensors      constants, sorted by FQN
          model.safetensors.index.json          which constant is in which of them
          fxc.json                              manifest: versions, hashes, whatever the compiler says of itself
          config.json, tokenizer.json, ...      files of the source, as they were

Nothing in it is unpickled or executed. The hashes find accidents; since whoever changes a file on purpose can write its
hash as well, everything behind them is checked as if there were none. Equal inputs and versions give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.checkpoint import SAFE_INDEX, check_shard, index_files
from fxc.errors import InputRefused, ResourceError, UsageError, VerificationFailed
from fxc.ir.check import check
from fxc.ir.program import Program
from fxc.ir.text import parse_program, print_program
from fxc.runtime.staging import resource_error, staged
from fxc.safety import (
    JSON_LIMIT,
    check_contained,
    check_files,
    check_finite,
    check_relative_name,
    listed,
    parse_json,
    read_json,
    safetensors_header,
)

FORMAT = 1
MANIFEST, TEXT = "fxc.json", "program.fxc"
_SHARD = "model-{:05}-of-{:05}.safetensors"
_OWN_KEYS = ("format", "format_version", "versions", "files", "sha256")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
# A file with such a name is read by transformers or by fxc when it is there, so it has to be in the manifest.
_READ_WHEN_THERE = {".json", ".safetensors", ".fxc", ".txt", ".model", ".jinja", ".spm", ".py"}
# What stands here in an operator has to be finite. Elsewhere, an attention mask may hold -inf.
_WEIGHTS = {"weight", "bias", "qweight", "scale"}
_DAMAGED = "the artifact was damaged or changed: copy it again or compile the model again"


@dataclass(frozen=True)
class Artifact:
    """What `read` found: a program whose constants are mapped from the files, and the manifest."""

    program: Program
    manifest: dict[str, Any]
    path: Path


def is_artifact(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


# ---------------------------------------------------------------------------------------------------------------- write


def save(
    program: Program,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes] = {},  # noqa: B006 - never changed
    overwrite: bool = False,
    source: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `program` as an artifact: all of it, verified by reading it again, or nothing.

    manifest: JSON to keep beside the program (finite numbers only); extra_files: relative name -> content, or a file to
    copy. overwrite: replace `out` if it is an artifact that holds nothing but its own files. source: the folder that the
    model came from, which `out` may not touch.

    Raises `UsageError` for a target or a manifest that cannot be, `VerificationFailed` for a program that is not well
    formed or does not read back, `ResourceError` for a full disk, a lack of permission or another writer.
    """
    out = Path(out)
    content = _manifest_of(manifest)
    _check_extra(extra_files)
    check(program)
    if program.is_on_meta:
        raise UsageError("the program has no values", where=out, hint="load the model's weights before compiling it")
    try:
        _check_values(program)
    except InputRefused as error:
        raise VerificationFailed(error.what, where=error.where, why=error.why) from None
    text = print_program(program)
    needed = program.nbytes() + len(text)
    try:
        needed += sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in extra_files.values())
    except OSError as error:
        raise resource_error(error, out) from error
    with staged(
        out, nbytes=needed, source=None if source is None else Path(source), may_replace=_foreign if overwrite else None
    ) as folder:
        (folder / TEXT).write_text(text, encoding="ascii")
        _write_shards(program.constants, folder, max_shard_bytes, out)
        for name, file in sorted(extra_files.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
        content["files"] = _describe(folder)
        (folder / MANIFEST).write_bytes(_encode(content))
        _verify(folder, out, program)


def _manifest_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    if taken := sorted(set(manifest) & set(_OWN_KEYS)):
        raise UsageError(f"the manifest's key {taken[0]!r} is fxc's own", where="manifest", hint="use another key")
    try:
        own = json.loads(json.dumps(dict(manifest), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("the manifest is not JSON", where="manifest", why=error, hint="pass strings, numbers, lists and dicts") from None
    versions = {name: metadata.version(name) for name in ("fxc", "torch", "transformers")}
    return {**own, "format": "fxc", "format_version": FORMAT, "versions": versions}


def _check_extra(extra_files: Mapping[str, Path | bytes]) -> None:
    for name in extra_files:
        plain = PurePosixPath(check_relative_name(name, where="extra_files"))
        if str(plain) != name or name in (MANIFEST, TEXT, SAFE_INDEX) or plain.suffix == ".safetensors":
            raise UsageError(f"{name!r} is fxc's own file name, or is written oddly", where="extra_files")


def _write_shards(constants: dict[str, Tensor], folder: Path, max_shard_bytes: int, out: Path) -> None:
    """Write nothing where there are no constants."""
    shards: list[list[str]] = []
    size = 0
    for fqn, tensor in sorted(constants.items()):
        nbytes = tensor.numel() * tensor.element_size()
        if not shards or size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(fqn)
        size += nbytes
    names = [_SHARD.format(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        # Copies, one shard at a time: the library refuses tensors that share memory, as two views of one tensor do.
        tensors = {fqn: constants[fqn].detach().cpu().contiguous() for fqn in shard}
        seen: set[int] = set()
        for fqn, tensor in tensors.items():
            pointer = tensor.untyped_storage().data_ptr()
            tensors[fqn] = tensor.clone() if pointer in seen else tensor
            seen.add(pointer)
        try:
            save_file(tensors, folder / name)
        except SafetensorError as error:  # its way to report what the operating system says
            raise ResourceError(
                "the weights could not be written",
                where=out,
                why=error,
                hint="check the free space of the disk and your permissions; what was there before is unchanged",
            ) from error
        except KeyError as error:
            raise UsageError(f"constants of {error} cannot be stored", where=listed(shard)) from None
    if shards:
        weight_map = {fqn: name for name, shard in zip(names, shards) for fqn in shard}
        total = sum(t.numel() * t.element_size() for t in constants.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="ascii")


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    digests = _digests(list(files.values()))
    return {n: {"sha256": d, "size": p.stat().st_size} for (n, p), d in zip(files.items(), digests)}


def _digests(paths: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return list(pool.map(digest, paths))


def _encode(content: dict[str, Any]) -> bytes:
    """The only bytes that say `content`, with their own hash."""
    plain = {k: v for k, v in content.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**plain, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _verify(folder: Path, out: Path, program: Program) -> None:
    try:
        again = read(folder).program
    except InputRefused as error:
        raise VerificationFailed(
            f"what was written does not read back: {error.what}", where=out, why=f"{error.where}: {error.why}"
        ) from error
    for fqn, tensor in program.constants.items():
        if not torch.equal(_bytes(again.constants[fqn]), _bytes(tensor)):
            raise VerificationFailed("what was written does not read back: other values", where=fqn)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _foreign(folder: Path) -> str | None:
    """Why `folder` must not be replaced: it is no artifact, or there is something in it that is not the artifact's."""
    if not is_artifact(folder):
        return f"it is not an artifact: it has no {MANIFEST}"
    try:
        names = set(_read_manifest(folder)["files"])
    except InputRefused as error:
        return f"its manifest is damaged: {error.what}"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    other = present - names - {MANIFEST}
    return f"it holds files that fxc did not write: {listed(other)}" if other else None


# ----------------------------------------------------------------------------------------------------------------- read


def read(path: str | Path) -> Artifact:
    """The artifact in the folder `path`, all of it verified: every file against its hash, the text against the rules of
    the IR and what its operators compute, the constants against the text, and that weights and scales are numbers.

    Raises `InputRefused`, with the file and what is wrong with it, and `ResourceError` where a file cannot be read.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        _check_listed(path, manifest["files"])
        constants = _read_constants(path, manifest["files"])
        program = _parse(path / TEXT, constants)
        _check_values(program)
    except OSError as error:
        raise ResourceError(
            f"could not be read: {error.strerror or error}", where=error.filename or path, hint="check its permissions"
        ) from error
    return Artifact(program, manifest, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    where = path / MANIFEST
    if not where.is_file():
        raise InputRefused(
            f"this is not an fxc artifact: it has no {MANIFEST}", where=path, hint="'fxc compile MODEL -o DIR' writes one"
        )
    check_contained(path, where)
    content = read_json(where)
    version = content.get("format_version")
    if content.get("format") != "fxc" or type(version) is not int or version < 1:
        raise InputRefused("this is not the manifest of an artifact", where=where, hint=_DAMAGED)
    if version > FORMAT:
        raise InputRefused(
            f"the artifact has format {version}, and this version of fxc reads up to {FORMAT}",
            where=where,
            why=f"it was written by fxc {_text(content, 'versions', 'fxc')}",
            hint="upgrade fxc (pip install -U fxc)",
        )
    try:
        intact = _encode(content) == where.read_bytes()
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise InputRefused("the file does not match its own hash", where=where, hint=_DAMAGED)
    files = content.get("files")
    if not isinstance(files, dict) or TEXT not in files:
        raise InputRefused("the manifest does not say which files there are", where=where, hint=_DAMAGED)
    for name, entry in files.items():
        check_relative_name(name, where=where)
        entry = entry if isinstance(entry, dict) else {}
        digest, size = entry.get("sha256"), entry.get("size")
        if not isinstance(digest, str) or not _DIGEST.match(digest) or type(size) is not int:
            raise InputRefused(f"the manifest has no hash and size of {name}", where=where, hint=_DAMAGED)
    return content


def _text(content: Any, *keys: str) -> str:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return str(content)[:80]


def _check_listed(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Every file is there, in the folder, and has the size and the hash of the manifest; no other file would be read."""
    check_files(path)
    for name, entry in files.items():
        file = path / name
        check_contained(path, file)
        if not file.is_file():
            raise InputRefused("the file is missing", where=file, why=f"{MANIFEST} lists it", hint=_DAMAGED)
        size = file.stat().st_size
        if size != entry["size"]:
            difference = entry["size"] - size
            what = f"truncated: {difference:,} bytes are missing" if difference > 0 else "bytes left over at the end"
            raise InputRefused(what, where=file, why=f"it has {size:,} bytes, not {entry['size']:,}", hint=_DAMAGED)
    others = {p.name for p in path.iterdir() if p.suffix in _READ_WHEN_THERE and p.is_file()} - files.keys() - {MANIFEST}
    if others:
        raise InputRefused(
            "there are files that the manifest does not list",
            where=path,
            why=listed(others),
            hint="move them away: loaders would read them as if they were the model's",
        )
    for (name, entry), digest in zip(files.items(), _digests([path / name for name in files])):
        if digest != entry["sha256"]:
            raise InputRefused("the file does not match its hash", where=path / name, why=f"in {MANIFEST}", hint=_DAMAGED)


def _read_constants(path: Path, files: dict[str, Any]) -> dict[str, Tensor]:
    shards = {name for name in files if name.endswith(".safetensors")}
    weight_map = {}
    if SAFE_INDEX in files:
        weight_map = parse_json((path / SAFE_INDEX).read_bytes(), where=path / SAFE_INDEX)["weight_map"] if shards == set(index_files(path, SAFE_INDEX)) else {}
    constants: dict[str, Tensor] = {}
    return constants


def _parse(file: Path, constants: dict[str, Tensor]) -> Program:
    raise NotImplementedError
