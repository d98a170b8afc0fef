"""A recipe file: the passes, what to leave alone, the dtype and how much of the data is read, as TOML.

passes = ["int4:algorithm=gptq"]
skip = ["*.lm_head"]
dtype = "bfloat16"
calib_samples = 128
calib_length = 512
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fxc.errors import UsageError

AMOUNTS = ("calib_samples", "calib_length", "train_samples", "train_length")
KEYS = ("passes", "skip", "dtype", *AMOUNTS)


def read_recipe(path: Path) -> dict[str, Any]:
    """What a file says of `Options`, by name. Raises `UsageError` for a file that is not there, not TOML, or says something
    that no recipe has."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("the recipe cannot be read", where=path, why=error) from error
    if unknown := sorted(content.keys() - set(KEYS)):
        raise UsageError(f"a recipe has no {', '.join(unknown)}", where=path, hint=f"it has {', '.join(KEYS)}")
    if not isinstance(content.get("dtype", ""), str):
        raise UsageError("dtype has to be a string", where=path)
    for key in AMOUNTS:
        if type(content.get(key, 1)) is not int:
            raise UsageError(f"{key} has to be a whole number", where=path)
    for key in ("passes", "skip"):
        value = content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UsageError(f"{key} has to be a list of strings", where=path, hint=f'{key} = ["..."]')
    return content


def recipe_text(
    passes: Iterable[str], skip: Iterable[str] = (), dtype: object = "auto", amounts: Mapping[str, int] | None = None
) -> str:
    """The file that says so, which `read_recipe` reads: a pass a line. dtype: left out where it is "auto"; amounts: of the data
    that is read, by name."""
    # Strings of JSON are strings of TOML.
    quoted = "".join(f"    {json.dumps(each, ensure_ascii=False)},\n" for each in passes)
    lines = [f"passes = [\n{quoted}]" if quoted else "passes = []"]
    if skip := list(skip):
        lines.append(f"skip = {json.dumps(skip, ensure_ascii=False)}")
    if str(dtype) != "auto":
        lines.append(f"dtype = {json.dumps(str(dtype).removeprefix('torch.'))}")
    lines += [f"{name} = {number}" for name, number in (amounts or {}).items()]
    return "\n".join(lines) + "\n"
