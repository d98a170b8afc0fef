"""Folders changed at random: bytes, JSON, names, headers of weights, links; half of the artifacts with hashes that fit."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxc.artifact import manifest

# What stands in the place of a value of JSON.
HOSTILE = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 1e308, 1e-320, "", "x", "../x",
    "/etc/passwd",
    "C:\\x", "\\\\host\\x", "a\0b", "\x1b[2J", "<script>alert(1)</script>", "\u202e", "\ud800", "{{7*7}}", "${x}",
    "%s%n", "x" * 5000,
    [], {}, [[]], [1] * 1000, {"a": {"a": {}}}, "torch.load", "os.system", "NaN", "__import__('os').mkdir('executed')",
]  # fmt: skip
KEYS = [
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "transformers_weights",
    "quantization_config", "trust_remote_code", "model_type", "architectures", "__class__", "torch_dtype", "dtype", "use_cache",
    "rope_scaling", "rope_parameters", "num_hidden_layers", "vocab_size", "hidden_size", "layer_types", "sliding_window",
    "weight_map",
    "metadata", "files", "format", "experts_implementation", "custom_pipelines", "base_model_tp_plan", "tie_word_embeddings",
]  # fmt: skip
WORDS = [
    "aten.from_file", "os.system", "aten.linear", "aten.maximum", "fxc.int8_linear", "fxc.int4_linear", "aten.empty",
    "aten.zeros",
    "aten.rand", "builtins.eval", "i64", "f64", "bf16", "s0", "s99", "u0", "s0*s0*s0", "9" * 40, "2**62", "-1", "0",
    "1e400", "nan", "@", "%",
    "%99", "@up.weight", "@__class__", "alias", "constant", "return", "(", ")", "[", "]", "[" * 2000, '"', "#", "=", ":",
    ",", "\n", "\t", "é", "None",
]  # fmt: skip


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one to three things in `folder`: what was done."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        path = draw.choice(files)
        change = draw.choice(_changes(path))
        done.append(f"{change.__name__} {path.name}")
        change(path, draw)
    return ", ".join(done)


def rehash(folder: Path) -> None:
    """Hashes that fit what the files are now, as somebody gives them who changes an artifact on purpose."""
    path = folder / "fxc.json"
    if any(each.is_symlink() for each in folder.rglob("*")):
        return  # a device has no end
    try:
        content = json.loads(path.read_bytes())
        assert isinstance(content, dict)
        path.unlink()
        content["files"] = manifest.describe(folder)
        path.write_bytes(manifest.encode(content))
    except Exception:  # it is no manifest any more, which is for the reader to say
        return


def _changes(path: Path) -> list[Callable[[Path, random.Random], None]]:
    common = [flip, cut, insert, repeat, remove, swap_files, link, empty, rename, pickled]
    if path.suffix == ".json":
        return [*[json_value] * 5, *[json_key] * 3, *common]
    if path.suffix == ".safetensors":
        return [*[header] * 5, *[header_length] * 2, *common]
    if path.suffix == ".fxc":
        return [*[word] * 6, *[lines] * 2, *common]
    return common


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 4, 40]) if data else 0):
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def insert(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    at = draw.randrange(len(data) + 1)
    path.write_bytes(data[:at] + draw.randbytes(draw.choice([1, 8, 4096])) + data[at:])


def repeat(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    ends = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    path.write_bytes(data[: ends[1]] + data[ends[0] : ends[1]] * draw.choice([1, 2, 50]) + data[ends[1] :])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def rename(path: Path, draw: random.Random) -> None:
    names = ["pytorch_model.bin", "model.safetensors", "x", "a b", "adapter_config.json", "é.json", "tokenizer.json"]
    path.rename(path.with_name(draw.choice(names)))


def swap_files(path: Path, draw: random.Random) -> None:
    other = draw.choice(sorted(p for p in path.parent.iterdir() if p.is_file() and not p.is_symlink()))
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def link(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["/etc/passwd", "../secret", path.name, "/dev/zero", "/proc/self/mem", "nowhere"]))


def pickled(path: Path, draw: random.Random) -> None:
    """A pickle that would make a folder, in the place of the file or beside it."""
    evil = pickle.dumps(_Evil(str(path.parent.parent / "executed")), protocol=2)
    target = draw.choice([path, path.with_name("pytorch_model.bin"), path.with_name("model.pt")])
    target.unlink(missing_ok=True)
    target.write_bytes(evil)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {}


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(items)[:300]:
        found.append((value, key))
        _places(each, found)
    return found


def _nested(draw: random.Random) -> Any:
    return draw.choice(HOSTILE) if draw.random() < 0.95 else json.loads("[" * 500 + "]" * 500)


def json_value(path: Path, draw: random.Random) -> None:
    content = _json(path)
    if places := _places(content, []):
        owner, key = draw.choice(places)
        old = owner[key]
        number = isinstance(old, int | float) and not isinstance(old, bool) and draw.random() < 0.4
        owner[key] = draw.choice([old + 1, old - 1, old * 1000, -old, old / 2]) if number else _nested(draw)
    path.write_text(json.dumps(content))


def json_key(path: Path, draw: random.Random) -> None:
    content = _json(path)
    owners = [content, *(owner[key] for owner, key in _places(content, []))]
    dicts = [each for each in owners if isinstance(each, dict)]
    if dicts:
        owner = draw.choice(dicts)
        if owner and draw.random() < 0.4:
            del owner[draw.choice(sorted(owner))]
        else:
            owner[draw.choice(KEYS)] = _nested(draw)
    path.write_text(json.dumps(content))


def header(path: Path, draw: random.Random) -> None:
    """Another value in the header of a safetensors file, with a length that fits."""
    data = path.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + length])
        places = _places(content, [])
        owner, key = draw.choice(places)
        if isinstance(owner, dict) and draw.random() < 0.3:
            owner[draw.choice(["../x", "a\0b", "__metadata__", "x" * 300, ""])] = owner.pop(key)
        elif isinstance(owner[key], int) and draw.random() < 0.6:
            owner[key] += draw.choice([-8, -1, 1, 4, 2**31, 2**62, -(2**40)])
        else:
            owner[key] = draw.choice([*HOSTILE, "F64", "F8_E4M3", "I64", "U16", "C64", "F4"])
        text = json.dumps(content).encode()
    except (ValueError, struct.error, IndexError, TypeError):
        return flip(path, draw)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return None


def header_length(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", draw.choice([0, 1, 7, 2**20, 2**40, 2**64 - 1])) + data[8:])


def word(path: Path, draw: random.Random) -> None:
    """Another word in the place of one of the text."""
    text = path.read_text(errors="replace")
    found = list(re.finditer(r"[\w.]+|[^\w\s]", text))
    if found:
        place = draw.choice(found)
        other = draw.choice([draw.choice(WORDS), draw.choice(found)[0]])
        text = text[: place.start()] + other + text[place.end() :]
    path.write_text(text)


def lines(path: Path, draw: random.Random) -> None:
    text = path.read_text(errors="replace").splitlines(keepends=True)
    if len(text) > 1:
        a, b = draw.sample(range(len(text)), 2)
        match draw.choice(["swap", "drop", "twice", "many"]):
            case "swap":
                text[a], text[b] = text[b], text[a]
            case "drop":
                del text[a]
            case "twice":
                text.insert(b, text[a])
            case _:
                text[a:a] = [text[b]] * 2000
    path.write_text("".join(text))
