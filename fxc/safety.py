"""The single checks on an untrusted model folder: names, links, JSON, safetensors headers, what a config asks for.

An index can name files outside of its folder, a config can name code, and a cut file can be read as zeros. Every check
raises `InputRefused`, which names the file, the evidence and the next step. Nothing here imports transformers.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from fxc.errors import InputRefused
from fxc.mapped import passed

JSON_LIMIT = 100_000_000
# Bits per element of every dtype the safetensors format knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def check_relative_name(name: object, *, where: object) -> str:
    """`name` if it can only mean a file inside the folder, on any operating system."""
    if isinstance(name, str) and name.isprintable() and name and "\\" not in name:
        windows, posix = PureWindowsPath(name), PurePosixPath(name)
        anchored = windows.drive or windows.root or posix.root or ":" in name
        if not anchored and ".." not in posix.parts and posix.name:
            return name
    raise InputRefused(
        f"the file name {name!r} leads out of the model's folder",
        where=where,
        why="such a name makes a loader read, and a compiler republish, files that are not the model's",
        hint="do not use this checkpoint; report it where you got it",
    )


def check_contained(folder: Path, path: Path) -> Path:
    """The real path of `path`: in `folder`, or in the blobs of the Hugging Face cache that `folder` is part of."""
    root = folder.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as exc:  # RuntimeError is Python 3.12's, and older ones', for a circle
        hint = "replace it by the file itself"
        raise InputRefused("the file is a link that leads nowhere", where=path, why=exc, hint=hint) from None
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputRefused(
            "the file is a link that leads out of the model's folder",
            where=path,
            why=f"it points to {real}",
            hint="replace the link by a copy of the file if you trust it",
        )
    return real


def check_files(folder: Path) -> None:
    """No file of the folder is a link out of it or absurdly large JSON: they are read, or copied into an artifact."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.is_dir():
            check_contained(folder, path)
        if path.suffix == ".json" and path.is_file():
            check_json_size(path)


def check_json_size(path: Path) -> None:
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise InputRefused(
            f"the file has {size:,} bytes",
            where=path,
            why=f"no configuration, vocabulary or index needs more than {JSON_LIMIT:,}",
            hint="get the file again from its source",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file: at most 100 MB, no key given twice."""
    check_json_size(path)
    return parse_json(path.read_bytes(), where=path)


def parse_json(data: bytes, *, where: object) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ValueError(f"given twice: {listed(name for name in counts if counts[name] > 1)}")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (ValueError, RecursionError) as exc:
        raise InputRefused("not a JSON object", where=where, why=exc, hint="get the file again") from exc
    return value


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """(tensor name -> {dtype, shape, data_offsets}, the header's bytes) of a file that is exactly as long as it says.

    Format: 8 bytes little-endian N, N bytes of JSON, then the data. Offsets count from the end of the JSON, and the
    tensors cover the data without gap or overlap.
    """

    def refused(what: str, why: object) -> InputRefused:
        return InputRefused(what, where=path, why=why, hint="copy or download the file again")

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise refused(f"truncated: {8 - len(prefix)} of its first 8 bytes are missing", f"it has {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if not 2 <= length <= JSON_LIMIT:
            raise refused("not a safetensors file", f"a header of {length:,} bytes, where 2 to {JSON_LIMIT:,} can be")
        if length > size - 8:
            raise refused(f"truncated: {length + 8 - size:,} bytes of its header are missing", f"it has {size:,} bytes")
        raw = file.read(length)
    entries = parse_json(raw, where=path)
    entries.pop("__metadata__", None)
    try:
        data_size = check_layout(entries)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        why = f"unknown or missing {exc}" if isinstance(exc, KeyError) else exc
        raise refused("its header does not describe a valid file", why) from exc

    expected = 8 + length + data_size
    if size != expected:
        fault = f"truncated: {expected - size:,} bytes are missing" if size < expected else "bytes left over at the end"
        raise refused(fault, f"its header describes {expected:,} bytes and the file has {size:,}")
    return entries, prefix + raw


def check_layout(entries: dict[str, dict[str, Any]]) -> int:
    """The number of data bytes that the tensors cover; ValueError, KeyError or TypeError if they do not tile them."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
            raise ValueError(f"{name}: shape and offsets have to be whole numbers")
        bits = math.prod(shape) * DTYPE_BITS[entry["dtype"]]
        if bits != 8 * (stop - start):
            raise ValueError(f"{name}: {stop - start} bytes for {shape} of {entry['dtype']}")
        if start != end:
            raise ValueError(f"{name}: starts at byte {start}, and the one before it ends at {end}")
        end = stop
    return end


def check_config(config: dict[str, Any], *, where: object, trust_remote_code: bool) -> None:
    """Refuse what a config can ask for and fxc does not do: foreign code, kernels and files, weights packed already."""
    for key, name, value in walk(config):
        if name == "auto_map" and not trust_remote_code:
            raise InputRefused(
                "the model runs code of its own (auto_map in its config)",
                where=where,
                why=f"{key} = {value}",
                hint="read that code, then pass trust_remote_code=True (--trust-remote-code)",
            )
        implementation = name.removeprefix("_") in {"attn_implementation", "experts_implementation"}
        kernel = implementation and any(mark in str(value) for mark in "/:")
        if kernel or name in {"_attn_implementation_internal", "_experts_implementation_internal"}:
            raise InputRefused(
                "the config names an attention or experts implementation, which may be code to download",
                where=where,
                why=f"{key} = {value}",
                hint=f"remove {name} from the config: the caller chooses the implementation, not the file",
            )
        if name in {"quantization_config", "compression_config"} and value:
            known = value if isinstance(value, dict) else {}
            method = known.get("quant_method") or known.get("format") or "an unnamed method"
            bits = f", {known['bits']} bits" if "bits" in known else ""
            raise InputRefused(
                f"the model is already quantized ({method}{bits})",
                where=where,
                why=f"{key} is set, so its weights are packed codes",
                hint="start from the model it was made from, in float32, bfloat16 or float16",
            )
        if name == "transformers_weights":
            raise InputRefused(
                "the config redirects to another weights file",
                where=where,
                why=f"{key} = {value}",
                hint="name the file model.safetensors and remove the key",
            )


def walk(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(dotted path, key, value) of every entry of nested objects and lists, at any depth."""
    stack = [("", value)]
    while stack:
        path, value = stack.pop()
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in entries:
            dotted = f"{path}.{key}" if path else str(key)
            yield dotted, str(key), inner
            stack.append((dotted, inner))


# So many numbers are looked at together: what that computes takes several times their memory.
_AT_ONCE = 1 << 24


def as_comparable(numbers: Tensor) -> Tensor:
    """Numbers of a byte as float32: not every operator of torch takes them."""
    return numbers.float() if numbers.element_size() == 1 else numbers


def are_finite(numbers: Tensor) -> bool:
    """Whether none of some numbers is NaN or infinite."""
    numbers = as_comparable(numbers)
    if numbers.is_complex() or not numbers.numel():
        return bool(torch.isfinite(numbers).all())
    # Some tens of times as fast as to ask each number: NaN is the least and the most of all.
    return all(math.isfinite(each) for each in torch.aminmax(numbers))


def _are_finite_by_pieces(tensor: Tensor) -> bool:
    for piece in tensor.reshape(-1).split(_AT_ONCE):
        if not are_finite(piece):
            return False
        if tensor.numel() > _AT_ONCE:
            passed(piece)
    return True


def check_finite(named: Iterable[tuple[str, Tensor]], *, inf_allowed: bool = False) -> None:
    """Refuse NaN and Inf, naming each tensor and its counts. Tensors on meta, and of integers, pass.

    inf_allowed: for buffers, where -inf is a common mask value.
    """
    faults = []
    for name, tensor in named:
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if _are_finite_by_pieces(tensor):
            continue
        tensor = as_comparable(tensor)
        nan = int(tensor.isnan().sum())
        inf = 0 if inf_allowed else int(tensor.isinf().sum())
        if nan or inf:
            faults.append(f"{name} ({nan} NaN, {inf} Inf of {tensor.numel()})")
    if faults:
        raise InputRefused(
            f"{len(faults)} tensors hold values that are not finite",
            where=faults[0].split(" ")[0],
            why=listed(faults, limit=8),
            hint="repair the checkpoint; if it was converted to float16, values above 65504 became Inf: use bfloat16",
        )
