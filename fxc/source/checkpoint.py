"""A Hugging Face checkpoint folder, checked as a whole: its config, its weight files, and that they fit together."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxc.errors import InputRefused
from fxc.safety import (
    check_config,
    check_contained,
    check_files,
    check_relative_name,
    listed,
    read_json,
    safetensors_header,
)

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
OTHER_FORMATS = {".safetensors", ".gguf", ".onnx", ".h5", ".msgpack"}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed. No tensor data has been read.

    config: config.json. weights: the files transformers will read, all safetensors or all pickles.
    dtype: the one most bytes are stored in, None for pickles.
    files: name -> {sha256, size}; sha256 of all of config.json, of a safetensors file's header, not of a pickle.
    tensors: name -> bytes, of safetensors; empty for pickles, which would have to be run to know.
    """

    folder: Path
    config: dict[str, Any]
    weights: list[str]
    dtype: torch.dtype | None
    files: dict[str, dict[str, Any]]
    tensors: dict[str, int]

    @property
    def is_safetensors(self) -> bool:
        return self.weights[0].endswith(".safetensors")


def check_folder(folder: Path, *, trust_remote_code: bool, allow_pickle: bool) -> Checkpoint:
    """The checkpoint in `folder`; InputRefused names the first thing that is unsafe, damaged or unsupported."""
    config = check_config_file(folder, trust_remote_code=trust_remote_code)
    names, weight_map = weight_files(folder, allow_pickle)
    files = {"config.json": fingerprint((folder / "config.json").read_bytes(), folder / "config.json")}
    tensors: dict[str, dict] = {}
    for name in names:
        path = folder / name
        check_contained(folder, path)
        if not path.is_file():
            raise InputRefused(
                "the file is missing",
                where=path,
                why="the index places tensors in it" if weight_map else "it is not a regular file",
                hint="finish the copy or download of the model",
            )
        if path.suffix != ".safetensors":
            files[name] = {"size": path.stat().st_size}
            continue
        header, raw = safetensors_header(path)
        if weight_map:
            check_shard(path, {key for key, file in weight_map.items() if file == name}, set(header))
        files[name] = fingerprint(raw, path)
        tensors |= header
    sizes = {name: end - start for name, header in tensors.items() for start, end in [header["data_offsets"]]}
    return Checkpoint(folder, config, names, stored_dtype(tensors, folder) if tensors else None, files, sizes)


def check_config_file(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The content of config.json, after everything in the folder but the weights has been checked."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        # transformers would follow it and load the base model that the adapter names, from wherever that is.
        raise InputRefused(
            "the folder holds a PEFT adapter",
            where=folder,
            why="adapter_config.json is there",
            hint="merge the adapter into its base model first (merge_and_unload)",
        )
    if not path.is_file():
        raise InputRefused(
            "not a Hugging Face model: it has no config.json",
            where=folder,
            hint="check the path, which may have to end in a subfolder, and that the download is complete",
        )
    check_files(folder)
    config = read_json(path)
    check_config(config, where=path, trust_remote_code=trust_remote_code)
    return config


def weight_files(folder: Path, allow_pickle: bool) -> tuple[list[str], dict[str, str]]:
    """(weight files that transformers will read, weight_map of their index or {}), chosen in transformers' order."""
    single, index = (folder / SAFE).exists(), (folder / SAFE_INDEX).exists()
    if single and index and set(index_files(folder, SAFE_INDEX)) != {SAFE}:
        raise InputRefused(
            "two checkpoints in one folder",
            where=folder,
            why=f"{SAFE}, and {SAFE_INDEX} that names other files; loaders differ in which one they take",
            hint="move the stale one away",
        )
    if index:
        return index_files(folder, SAFE_INDEX), read_json(folder / SAFE_INDEX)["weight_map"]
    if single:
        return [SAFE], {}

    names = [path.name for path in folder.iterdir()]
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if not pickles:
        others = [name for name in names if Path(name).suffix in OTHER_FORMATS]
        raise InputRefused(
            f"no weights: neither {SAFE} nor {SAFE_INDEX}",
            where=folder,
            why=f"there is {listed(others)}" if others else None,
            hint="write the model with save_pretrained(), or finish the download",
        )
    if not allow_pickle:
        raise InputRefused(
            "the weights are pickle files, which can run code when they are read",
            where=folder,
            why=listed(pickles),
            hint="take the model's safetensors version; "
            "fxc.source.load.load_source(folder, allow_pickle=True) reads tensors alone",
        )
    if PICKLE in names:
        return [PICKLE], {}
    if PICKLE_INDEX in names:
        return index_files(folder, PICKLE_INDEX), read_json(folder / PICKLE_INDEX)["weight_map"]
    raise InputRefused(
        f"no weights named {PICKLE}",
        where=folder,
        why=f"there is {listed(pickles)}",
        hint="transformers reads that name only: rename the file",
    )


def index_files(folder: Path, index: str) -> list[str]:
    """The weight files an index names, sorted; each is a name inside the folder, with the suffix the index is for."""
    path = folder / index
    check_contained(folder, path)
    content = read_json(path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise InputRefused(
            "not a checkpoint index", where=path, why="it lacks weight_map or metadata", hint="get the file again"
        )
    for name in weight_map.values():
        check_relative_name(name, where=path)
    names = sorted(set(weight_map.values()))
    suffix = ".safetensors" if index == SAFE_INDEX else ".bin"
    if wrong := [name for name in names if not name.endswith(suffix)]:
        raise InputRefused(
            f"the index names files that are not {suffix}",
            where=path,
            why=listed(wrong),
            hint="do not use this checkpoint; report it where you got it",
        )
    return names


def check_shard(path: Path, promised: set[str], present: set[str]) -> None:
    """The tensors of a shard are exactly those that the index places in it."""
    if promised == present:
        return
    lacking, extra = promised - present, present - promised
    why = [f"in the index only: {listed(lacking)}"] if lacking else []
    why += [f"in the file only: {listed(extra)}"] if extra else []
    raise InputRefused(
        f"the file and the index disagree on {len(lacking) + len(extra)} tensors",
        where=path,
        why="; ".join(why),
        hint="index and shards come from different saves: get all of them again",
    )


def stored_dtype(tensors: dict[str, dict], where: Path) -> torch.dtype:
    """The dtype that most bytes are stored in, position indices and masks left aside."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        if entry["dtype"] not in {"I64", "BOOL"}:
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    name = max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="nothing but indices")
    if name not in FLOATS:
        raise InputRefused(
            f"the weights are stored as {name}",
            where=where,
            why="fxc starts from float32, bfloat16 or float16; other weights are packed, or need a choice of rounding",
            hint="convert the checkpoint to one of these first",
        )
    return FLOATS[name]


def fingerprint(data: bytes, path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": path.stat().st_size}
