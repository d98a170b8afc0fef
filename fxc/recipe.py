"""A recipe file: the passes, what to leave alone and the dtype, as TOML.

passes = ["int8:mode=dynamic"]
skip = ["*.lm_head"]
dtype = "bfloat16"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxc.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """What a file says; None for what it does not."""

    passes: tuple[str, ...] | None = None
    skip: tuple[str, ...] | None = None
    dtype: str | None = None


def read_recipe(path: Path) -> Recipe:
    """Raises `UsageError` for a file that is not there, not TOML, or says something that no recipe has."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("the recipe cannot be read", where=path, why=error) from error
    if unknown := sorted(content.keys() - {"passes", "skip", "dtype"}):
        raise UsageError(f"a recipe has no {', '.join(unknown)}", where=path, hint="it has passes, skip and dtype")
    dtype = content.get("dtype")
    if dtype is not None and not isinstance(dtype, str):
        raise UsageError("dtype has to be a string", where=path)
    return Recipe(_strings(content, "passes", path), _strings(content, "skip", path), dtype)


def _strings(content: dict[str, Any], key: str, path: Path) -> tuple[str, ...] | None:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{key} has to be a list of strings", where=path, hint=f'{key} = ["..."]')
    return tuple(value)
