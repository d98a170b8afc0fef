"""Nested arguments and results as JSON: which flat tensor stands where.

A plain integer is an index into the flat tensors. {"list": [...]}, {"tuple": [...]} and {"dict": {...}} nest,
{"class": "module:Name", "dict": {...}} is a Hugging Face ModelOutput, {"value": x} a constant that is not a tensor.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from fxc.errors import InputRefused, UsageError


def flatten(value: Any, flat: list[Tensor], names: list[str], name: str = "") -> Any:
    """Append the tensors in `value` to `flat` and a name for each to `names`; return the structure over their indices."""

    def child(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Tensor):
        flat.append(value)
        names.append(name or "out")
        return len(flat) - 1
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict):
        items = {str(k): flatten(v, flat, names, child(k)) for k, v in value.items() if v is not None}
        kind = type(value)
        return {"dict": items} if kind is dict else {"class": f"{kind.__module__}:{kind.__qualname__}", "dict": items}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(v, flat, names, child(i)) for i, v in enumerate(value)]}
    raise UsageError(
        f"a {type(value).__name__} stands where a tensor is expected ({name or 'the output'})",
        hint="inputs and outputs may be tensors in nested lists, tuples, dicts and Hugging Face ModelOutputs",
    )


def unflatten(structure: Any, flat: Any) -> Any:
    """The value that `structure` says, over the tensors in `flat`. Executes nothing: a class is looked up in transformers
    alone and must be a ModelOutput."""
    if isinstance(structure, int):
        return flat[structure]
    if "value" in structure:
        return structure["value"]
    if "list" in structure:
        return [unflatten(s, flat) for s in structure["list"]]
    if "tuple" in structure:
        return tuple(unflatten(s, flat) for s in structure["tuple"])
    items = {k: unflatten(s, flat) for k, s in structure["dict"].items()}
    return _output_class(structure["class"])(**items) if "class" in structure else items


def _output_class(name: str) -> type:
    from transformers.utils import ModelOutput

    module, _, qualified = name.partition(":")
    if module == "transformers" or module.startswith("transformers."):
        found = getattr(importlib.import_module(module), qualified, None)
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    raise InputRefused(
        f"the program returns a {name}, which is not an output class of transformers",
        hint="another version of transformers may have it; compile the model again with the one at hand",
    )
