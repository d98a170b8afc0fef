"""What a folder is that `fxc export` wrote, and which of its files are the export's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxc.artifact.companions import of_folder
from fxc.ir.cache import KIND
from fxc.safety import check_contained, read_json

_MARKS = {"onnx": "model.onnx", "aoti": "model.pt2", "gguf": "model.gguf"}
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "model.onnx*", "model.pt2", "names.json", "model.gguf")


def kind_of(folder: Path) -> str | None:
    """The format, as `fxc export --format` calls it; None for a folder that is no export."""
    for kind, name in _MARKS.items():
        if (folder / name).is_file():
            return kind
    if not any(folder.glob("model*.safetensors")):
        return None
    config = config_of(folder)
    quantized = config.get("quantization_config")
    if not isinstance(quantized, Mapping):
        return "hf" if config else None
    method = quantized.get("quant_method")
    return method if method in ("fxc", "compressed-tensors") else None


def config_of(folder: Path) -> Mapping[str, Any]:
    """What its config.json says, nothing where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    check_contained(folder, path)
    found = read_json(path)
    return found if isinstance(found, Mapping) else {}


def metadata_of(folder: Path) -> dict[str, str]:
    """What a card says of the model, as the metadata of a program has it: its class, and its kind where it generates."""
    named = config_of(folder).get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name is None:
        return {}
    return {"class": name} | ({"kind": KIND} if name.endswith(("ForCausalLM", "LMHeadModel")) else {})


def files_of(folder: Path) -> list[str]:
    """Relative names: of what exports write, and of the model's tokenizer and configuration."""
    own = {path.relative_to(folder).as_posix() for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return sorted(own | of_folder(folder).keys())
