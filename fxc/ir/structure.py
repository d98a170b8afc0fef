"""Nested arguments and results as JSON: which flat tensor stands where.

A plain integer is an index into the flat tensors. {"list": [...]}, {"tuple": [...]} and {"dict": {...}} nest,
{"class": "module:Name", "dict": {...}} is a Hugging Face ModelOutput or an OrderedDict, {"value": x} a constant that is not
a tensor. The entries of a ModelOutput that are None are left out, as it does itself; a dict keeps them.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

from torch import Tensor

from fxc.errors import InputRefused, UsageError

_HINT = (
    "inputs and outputs may be tensors in nested lists, tuples, dicts with strings as keys and the output classes of "
    "transformers; wrap the model in a module that takes and returns these"
)


def flatten(value: Any, flat: list[Tensor], names: list[str], name: str = "") -> Any:
    """Append the tensors in `value` to `flat` and a name for each to `names`; return the structure over their indices.

    Raises `UsageError` for what `unflatten` could not give back as it was: other classes than those above, named tuples,
    keys that are not strings.
    """

    def child(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Tensor):
        flat.append(value)
        names.append(name or "out")
        return len(flat) - 1
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    kind = type(value)
    if kind in (list, tuple):
        return {kind.__name__: [flatten(v, flat, names, child(i)) for i, v in enumerate(value)]}
    class_name = f"{kind.__module__}:{kind.__qualname__}"
    if kind is dict or (isinstance(value, dict) and _find_class(class_name) is kind):
        for key in value:
            if type(key) is not str:
                raise UsageError(f"a dict has the key {key!r}, which is not a string", where=name or "the output", hint=_HINT)
        drops = kind not in (dict, OrderedDict)
        items = {k: flatten(v, flat, names, child(k)) for k, v in value.items() if not (drops and v is None)}
        return {"dict": items} if kind is dict else {"class": class_name, "dict": items}
    raise UsageError(f"a {kind.__name__} stands where a tensor is expected", where=name or "the output", hint=_HINT)


def unflatten(structure: Any, flat: Any) -> Any:
    """The value that `structure` says, over the tensors in `flat`. Executes nothing: a class is looked up in transformers
    alone and must be a ModelOutput, or it is OrderedDict."""
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
    found = _find_class(name)
    if found is None:
        raise InputRefused(
            f"the program returns a {name}, which is not an output class of transformers",
            hint="another version of transformers may have it; compile the model again with the one at hand",
        )
    return found


def _find_class(name: str) -> type | None:
    """The ModelOutput of transformers, or OrderedDict, that is called `name` ("module:Name"); None for any other."""
    from transformers.utils import ModelOutput

    if name == "collections:OrderedDict":
        return OrderedDict
    module, _, qualified = name.partition(":")
    if module == "transformers" or module.startswith("transformers."):
        found = getattr(importlib.import_module(module), qualified, None)
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    return None
