"""What several commands need of the models and texts that they are given."""

from __future__ import annotations

from pathlib import Path

from fxc.errors import UsageError


def read_text(path: Path, option: str) -> str:
    """The text in the file that `option` names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=f"{option} {path}", why=error) from error
