"""The folder that a compiled model is: the text of its program, its constants, and a manifest of both.

    out/  program.fxc                        fxc.ir.text
          model-00001-of-0000N.safetensors   constants, sorted by FQN, as they are or, if the program says so, coded
          model.safetensors.index.json       which constant is in which of them
          fxc.json                           fxc.artifact.manifest
          config.json, tokenizer.json, ...   files of the source, as they were
          report.html                        for people; nothing reads it, and the manifest does not list it

Nothing in it is unpickled or executed, and everything behind the hashes is checked as if there were none. Equal inputs
and versions give equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx
from torch._ops import OpOverload

import fxc.schemes  # noqa: F401 - programs name its operators
from fxc import mapped
from fxc.artifact import coding, companions
from fxc.artifact.manifest import (
    CODED_FORMAT,
    DAMAGED,
    MANIFEST,
    PAGE,
    check_file,
    check_listed,
    describe,
    encode,
    new_manifest,
    read_manifest,
    replaceable,
)
from fxc.artifact.shard import write_shard
from fxc.artifact.staging import resource_error, staged
from fxc.errors import InputRefused, ResourceError, UsageError, VerificationFailed
from fxc.ir.check import check
from fxc.ir.parse import parse_program
from fxc.ir.program import Program
from fxc.ir.text import DTYPE_NAMES, DTYPES, print_program
from fxc.plugins import not_imported
from fxc.safety import check_finite, check_json_size, check_relative_name, listed, read_json, safetensors_header
from fxc.schemes.scheme import scheme_of
from fxc.source.checkpoint import SAFE_INDEX, check_shard, index_files

TEXT = "program.fxc"
_SHARD = "model-{:05}-of-{:05}.safetensors"
# What stands here in an operator has to be finite. Elsewhere, in an attention mask, there may be an -inf.
_FINITE = {"weight", "bias", "qweight", "values", "scale"}


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
    extra_files: Mapping[str, Path | bytes] | None = None,
    overwrite: bool = False,
    source: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    page: Callable[[Mapping[str, Any]], bytes] | None = None,
) -> None:
    """Write `program` as an artifact: all of it, verified by reading it again, or nothing.

    manifest: JSON to keep beside the program (finite numbers only); extra_files: relative name -> content, or a file to
    copy. overwrite: replace `out` if it is an artifact that holds nothing but its own files. source: the folder that
    the model came from, which `out` may not touch. page: what `report.html` is, made of the manifest.

    Raises `UsageError` for a target or a manifest that cannot be, `VerificationFailed` for a program that is not well
    formed or does not read back, `ResourceError` for a full disk, a lack of permission or another writer.
    """
    out, extra_files = Path(out), extra_files or {}
    content = new_manifest(manifest)
    _check_extra(extra_files)
    check(program)
    if program.is_on_meta:
        raise UsageError("the program has no values", where=out, hint="load the model's weights before compiling it")
    try:
        _check_values(program)
    except InputRefused as error:
        raise VerificationFailed(error.what, where=error.where, why=error.why) from None
    text = print_program(program)
    try:
        extra = sum(len(f) if isinstance(f, bytes) else Path(f).stat().st_size for f in extra_files.values())
    except OSError as error:
        raise resource_error(error, out) from error

    with staged(
        out,
        nbytes=program.nbytes() + len(text) + extra,
        source=None if source is None else Path(source),
        may_replace=replaceable if overwrite else None,
    ) as folder:
        (folder / TEXT).write_text(text, encoding="ascii")
        stored, codes = _coded(program.constants) if program.is_stored_coded else (program.constants, {})
        digests = _write_constants(stored, folder, max_shard_bytes, {} if codes else _parts(program))
        companions.write(extra_files, folder)
        content |= {"coded": codes, "format_version": CODED_FORMAT} if codes else {}
        content |= {"files": describe(folder, digests)}
        (folder / MANIFEST).write_bytes(encode(content))
        if page is not None:
            (folder / PAGE).write_bytes(page(content))
        _check_written(folder, out, program, digests, codes)


def _coded(constants: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The constants as they are stored, and the dtype and shape of each that is coded: those that are smaller so."""
    with ThreadPoolExecutor() as pool:
        found = dict(zip(constants, pool.map(coding.coded, constants.values()), strict=True))
    codes = {fqn: [DTYPE_NAMES[constants[fqn].dtype], *constants[fqn].shape] for fqn, made in found.items() if made is not None}
    return {fqn: tensor if found[fqn] is None else found[fqn] for fqn, tensor in constants.items()}, codes


def _check_extra(extra_files: Mapping[str, Path | bytes]) -> None:
    for name in extra_files:
        plain = PurePosixPath(check_relative_name(name, where="extra_files"))
        is_weights = plain.suffix == ".safetensors" and len(plain.parts) == 1
        if str(plain) != name or name in (MANIFEST, PAGE, TEXT, SAFE_INDEX) or is_weights:
            raise UsageError(f"{name!r} cannot be an extra file", where="extra_files", hint="use another name")


def _parts(program: Program) -> dict[Path, tuple[str, list[str]]]:
    """Files that hold constants of a program that is larger than memory, and nothing else: their SHA-256, and which."""
    if not program.is_streamed:
        return {}
    spill = program.constants.spill
    parts = spill.parts
    newest = {name: path for path, names in parts.items() for name in names}
    return {
        path: (spill.digests[path], names) for path, names in parts.items()
        if all(newest[name] == path and name in program.constants for name in names)
        and safetensors_header(path)[0].keys() == set(names)
    }  # fmt: skip


def _write_constants(
    constants: Mapping[str, Tensor], folder: Path, max_shard_bytes: int, parts: Mapping[Path, tuple[str, list[str]]]
) -> dict[str, str]:
    """Shards of at most `max_shard_bytes`, or of one tensor, and their index; nothing where there are no constants. parts:
    files that are shards already, their SHA-256, and the names of what is in them. Returns the SHA-256 of each shard, as the
    disk was found to have it."""
    there = {name for _, names in parts.values() for name in names}
    shards: list[list[str]] = []
    size = 0
    for fqn in sorted(constants.keys() - there):
        nbytes = _nbytes(constants[fqn])
        if not shards or size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(fqn)
        size += nbytes
    count, weight_map, digests = len(shards) + len(parts), {}, {}
    for number, shard in enumerate(shards, 1):
        name = _SHARD.format(number, count)
        weight_map |= dict.fromkeys(shard, name)
        digests[name] = write_shard(folder / name, {fqn: constants[fqn].detach().cpu() for fqn in shard})
    for number, (path, (digest, names)) in enumerate(parts.items(), len(shards) + 1):
        name = _SHARD.format(number, count)
        weight_map |= dict.fromkeys(names, name)
        if _linked(path, folder / name):
            digests[name] = digest
    if weight_map:
        total = sum(map(_nbytes, constants.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="ascii")
    return digests


def _linked(path: Path, to: Path) -> bool:
    """The same file under another name, or a copy where the file system has no two names for one: then False."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
        return False
    return True


def _check_written(folder: Path, out: Path, program: Program, known: Collection[str], coded: Collection[str]) -> None:
    """known: files that were read again when they were written; coded: the constants in them that are stored in another way."""
    try:
        again = read(folder, known).program
    except InputRefused as error:
        raise VerificationFailed(
            f"what was written does not read back: {error.what}", where=out, why=f"{error.where}: {error.why}"
        ) from error
    for fqn in coded:
        if not torch.equal(*(_bytes(each.constants[fqn]) for each in (again, program))):
            raise VerificationFailed("what was written does not read back: the values are others", where=fqn)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ----------------------------------------------------------------------------------------------------------------- read


def read(path: str | Path, known: Collection[str] = ()) -> Artifact:
    """The artifact in the folder `path`, all of it verified: every file against its hash, the text against the rules of
    the IR and what its operators compute, the constants against the text, and that weights and scales are numbers.

    known: files of which hashes and numbers are known to be right.

    Raises `InputRefused`, with the file and what is wrong with it, and `ResourceError` where a file cannot be read.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        files = manifest["files"]
        check_listed(path, files, known)
        if TEXT not in files:
            raise InputRefused(f"the artifact has no {TEXT}", where=path, hint=DAMAGED)
        constants, sure = _read_constants(path, files, known)
        constants |= _expanded(path, manifest.get("coded", {}), constants)
        program = _read_text(path / TEXT, constants, manifest.get("report"))
        with mapped.Reading(constants.values()) as reading:
            _check_values(program, sure)
            reading.done(constants.values())
    except OSError as error:
        where, what = error.filename or path, error.strerror or error
        raise ResourceError(f"could not be read: {what}", where=where, hint="check its permissions") from error
    return Artifact(program, manifest, path)


def read_outline(path: str | Path) -> Artifact:
    """`read` without the weights, which stay on meta: the manifest and the text alone are verified.

    Raises what `read` does.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        entry = manifest["files"].get(TEXT)
        if entry is None:
            raise InputRefused(f"the artifact has no {TEXT}", where=path, hint=DAMAGED)
        check_file(path, TEXT, entry)
        program = _read_text(path / TEXT, None, manifest.get("report"))
    except OSError as error:
        where, what = error.filename or path, error.strerror or error
        raise ResourceError(f"could not be read: {what}", where=where, hint="check its permissions") from error
    return Artifact(program, manifest, path)


def _read_constants(path: Path, files: dict[str, Any], known: Collection[str]) -> tuple[dict[str, Tensor], set[str]]:
    """FQN -> tensor, mapped from the files and not copied; and which of them are in files that are `known`."""
    # In a folder of their own are the weights of what comes after the model: see fxc.artifact.companions.
    shards = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if not shards and SAFE_INDEX not in files:
        return {}, set()
    indexed = index_files(path, SAFE_INDEX) if SAFE_INDEX in files else []
    if indexed != shards:
        raise InputRefused(
            "index and manifest name other files of weights",
            where=path / SAFE_INDEX,
            why=f"only one of them names {listed(set(indexed) ^ set(shards))}",
            hint=DAMAGED,
        )
    weight_map = read_json(path / SAFE_INDEX)["weight_map"]
    promised: defaultdict[str, set[str]] = defaultdict(set)
    for fqn, name in weight_map.items():
        promised[name].add(fqn)
    constants: dict[str, Tensor] = {}
    sure: set[str] = set()
    for name in shards:
        file = path / name
        header, _ = safetensors_header(file)
        check_shard(file, promised[name], set(header))
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                constants |= {fqn: opened.get_tensor(fqn) for fqn in sorted(header)}
        except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
            # Whatever safetensors and torch object to (a dtype of another version, say), the file is at fault.
            raise InputRefused("the weights cannot be read", where=file, why=error, hint=DAMAGED) from None
        sure |= header.keys() if name in known else set()
    return constants, sure


def _expanded(path: Path, codes: object, constants: dict[str, Tensor]) -> dict[str, Tensor]:
    """The constants that are coded, as they were. codes: of each the dtype and shape, as a manifest says."""
    if not isinstance(codes, dict) or not codes.keys() <= constants.keys():
        raise InputRefused("the manifest says of constants that are not there that they are coded", where=path, hint=DAMAGED)
    found = {}
    for fqn, code in codes.items():
        dtype = DTYPES.get(code[0]) if isinstance(code, list) and code and isinstance(code[0], str) else None
        if dtype is None or not all(type(size) is int and size >= 0 for size in code[1:]):
            raise InputRefused("the manifest says no dtype and shape of a coded constant", where=fqn, hint=DAMAGED)
        try:
            found[fqn] = coding.expanded(constants[fqn], dtype, tuple(code[1:]))
        except InputRefused as error:
            raise InputRefused(error.what, where=fqn, why=error.why, hint=DAMAGED) from None
    return found


def _read_text(file: Path, constants: dict[str, Tensor] | None, report: Any) -> Program:
    """report: what names the plugins that the program may need."""
    check_json_size(file)
    try:
        text = file.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        raise InputRefused("it has characters that no program has", where=file, why=error, hint=DAMAGED) from None
    try:
        program = parse_program(text, constants)
        check(program)
    except InputRefused as error:
        line = (error.where or "").removeprefix("program text, ")
        why, hint = not_imported(report) or (error.why, error.hint)
        raise InputRefused(error.what, where=f"{file}, {line}", why=why, hint=hint) from None
    except VerificationFailed as error:
        where = f"{file}, {error.where}"
        raise InputRefused(error.what, where=where, why=error.why, hint=DAMAGED, excerpt=error.excerpt) from None
    lines, again = text.split("\n"), print_program(program).split("\n")
    if lines != again:
        number = next((i for i, (a, b) in enumerate(zip(lines, again)) if a != b), min(len(lines), len(again)) - 1)
        raise InputRefused(
            "the line is not written as fxc writes it",
            where=f"{file}, line {number + 1}",
            why=lines[number][:160],
            hint=DAMAGED,
        )
    return program


def _check_values(program: Program, sure: Collection[str] = ()) -> None:
    """No constant holds NaN; weights, biases and scales are finite; the scales of fxc's operators are positive, or
    not zero in formats whose scales may be negative. sure: those of which that is known."""
    roles: defaultdict[str, set[str]] = defaultdict(set)
    scales: dict[str, bool] = {}
    for node in program.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        named = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs
        for name, argument in named.items():
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                roles[argument.target].add(name)
                if node.target.namespace == "fxc" and name.endswith("scale"):
                    scheme = scheme_of(node.target)
                    scales[argument.target] = scheme is not None and scheme.has_signed_scales
    names = [name for name in program.constants if name not in sure]
    strict = {n for n in names if ({n.rpartition(".")[2]} | roles[n]) & _FINITE} | scales.keys()
    check_finite((n, program.constants[n]) for n in names if n in strict)
    check_finite(((n, program.constants[n]) for n in names if n not in strict), inf_allowed=True)
    for fqn, may_be_negative in scales.items():
        if fqn in sure:
            continue
        tensor = program.constants[fqn]
        if may_be_negative and not tensor.all():
            raise InputRefused("a scale is zero", where=fqn, hint=DAMAGED)
        if not may_be_negative and not (tensor > 0).all():
            smallest = f"the smallest is {tensor.min():.3g}"
            raise InputRefused("a scale is not positive", where=fqn, why=smallest, hint=DAMAGED)
