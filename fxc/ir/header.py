"""What a program's text says before its values: metadata, and the structures of the call and of its result. It may come from a
stranger."""

from __future__ import annotations

import re
from typing import Any

from fxc.ir.program import Input
from fxc.ir.tokens import DEEPEST, Bad

_DEFAULT = re.compile(r"(?:ones|zeros|empty):(.+)\Z", re.DOTALL)


def check_header(header: dict[str, Any], inputs: list[Input], outputs: list[str]) -> None:
    """Raises `Bad` for values of the lines metadata, call and result that no program has."""
    metadata, call, result = (header[key] for key in ("metadata", "call", "result"))
    name = metadata.get("class", "Program") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise Bad("metadata is not an object, or its class is not a name")
    names = [i.name for i in inputs]
    if len(set(names)) != len(names):
        raise Bad("two inputs have one name")
    for declared in inputs:
        found = declared.default is None or _DEFAULT.match(declared.default)
        if not found or (declared.default is not None and found[1] not in names):
            raise Bad(f"{declared.default!r} is not a default: ones:, zeros: or empty: and the name of an input")
    if (
        not isinstance(call, dict)
        or call.keys() != {"args", "kwargs"}
        or not isinstance(call["args"], list)
        or not isinstance(call["kwargs"], dict)
        or not all(_is_structure(c, len(names)) for c in (*call["args"], *call["kwargs"].values()))
    ):
        raise Bad("the call is not a structure over the inputs")
    defaults = metadata.get("defaults", {})
    if not isinstance(defaults, dict) or not all(
        isinstance(meanings, list) and meanings and all(_is_structure(m, 0) for m in meanings)
        for meanings in defaults.values()
    ):
        raise Bad("the defaults of arguments are not structures without tensors")
    if not _is_structure(result, len(outputs)):
        raise Bad("the result is not a structure over the outputs")


def _is_structure(value: Any, count: int, depth: int = 0) -> bool:
    """Whether `value` is what `fxc.ir.structure` says, over `count` tensors."""
    if type(value) is int:
        return 0 <= value < count
    if not isinstance(value, dict) or depth > DEEPEST:
        return False
    kinds = value.keys()
    if kinds == {"value"}:
        return value["value"] is None or isinstance(value["value"], (bool, int, float, str))
    if kinds in ({"list"}, {"tuple"}):
        (inner,) = value.values()
        return isinstance(inner, list) and all(_is_structure(v, count, depth + 1) for v in inner)
    if kinds not in ({"dict"}, {"class", "dict"}) or not isinstance(value.get("class", ""), str):
        return False
    return isinstance(value["dict"], dict) and all(_is_structure(v, count, depth + 1) for v in value["dict"].values())
