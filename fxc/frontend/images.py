"""The size of the images that a Hugging Face model is meant for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_DEFAULT = 64
"""Enough for five halvings, for models that are made in code."""


def image_size(config: Any) -> tuple[int, int]:
    """(height, width): what the configuration says, else what the image processor beside it makes, else 64 x 64."""
    parts = (getattr(config, "vision_config", None), getattr(config, "encoder", None), config)
    said = next((size for part in parts if (size := _pair(getattr(part, "image_size", None)))), None)
    return said or _of_processor(config) or (_DEFAULT, _DEFAULT)


def _of_processor(config: Any) -> tuple[int, int] | None:
    folder = Path(getattr(config, "name_or_path", None) or "")
    path = next((folder / name for name in _PROCESSORS if folder.name and (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads images by it will say so
        return None
    settings = settings.get("image_processor", settings)
    crops = settings.get("do_center_crop", "crop_size" in settings)
    return (_pair(settings.get("crop_size")) if crops else None) or _pair(settings.get("size"))


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of a number, of two, of {"height", "width"} or of {"shortest_edge"}."""
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else size.get("shortest_edge")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else None
