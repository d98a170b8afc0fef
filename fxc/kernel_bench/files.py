"""What reports of measurements are made of: versions, tables, and files that are there as a whole."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of Python and of each package the version, None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def versions_text(found: dict[str, str | None]) -> str:
    """ "python 3.12.1, torch 2.13.0", of what is installed."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def slug(name: str) -> str:
    """ "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Its lines."""
    cells = [" | ".join(each.replace("|", "\\|") for each in line) for line in body]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {line} |" for line in cells)]


def write_texts(folder: Path, texts: dict[str, str]) -> list[Path]:
    """texts: name of the file -> what is in it. Whatever ends this process, a file of before or the new one is there as a
    whole. Gives their paths; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    return [folder / name for name in texts]
