"""What a folder is that `fxc export` wrote, and which of its files are the export's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxc.artifact.companions import of_folder
from fxc.export.folder import MARK
from fxc.ir.cache import KIND
from fxc.safety import check_contained, read_json

_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
# Format -> what holds the weights, the first of which is there.
_WEIGHTS = {
    "hf": _SAFETENSORS, "compressed-tensors": _SAFETENSORS, "fxc": _SAFETENSORS, "onnx": ("model.onnx", "model.onnx.data"),
    "aoti": ("model.pt2", "names.json"), "gguf": ("model.gguf",),
}  # fmt: skip


def kind_of(folder: Path) -> str | None:
    """The format, as `fxc export --format` calls it; None for a folder that fxc did not write. Weights alone do not say so:
    those of the original model have the same names."""
    kind = _json(folder, MARK).get("format")
    if kind is None:
        # What transformers saved of a model that is in fxc's layers.
        quantized = config_of(folder).get("quantization_config")
        kind = "fxc" if isinstance(quantized, Mapping) and quantized.get("quant_method") == "fxc" else None
    is_known = isinstance(kind, str) and kind in _WEIGHTS
    return kind if is_known and any(folder.glob(_WEIGHTS[kind][0])) else None


def config_of(folder: Path) -> Mapping[str, Any]:
    """What its config.json says, nothing where there is none."""
    return _json(folder, "config.json")


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / name
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


def files_of(folder: Path, kind: str) -> list[str]:
    """Relative names: of what an export in the format `kind` writes, and of the model's tokenizer and configuration, which a
    GGUF file holds."""
    own = {path.relative_to(folder).as_posix() for pattern in (*_WEIGHTS[kind], MARK) for path in folder.glob(pattern)}
    return sorted(own | (set() if kind == "gguf" else of_folder(folder).keys()))
