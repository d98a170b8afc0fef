"""Rows: the lines of a .jsonl file, or the items of an iterable, each of them what one call takes or a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.images import Images, is_picture
from fxc.data.inputs import is_numbers
from fxc.data.labels import Classes, apart
from fxc.data.text import Texts
from fxc.errors import UsageError, first_line


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, object) of each line of a .jsonl file; blank lines are passed over."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"it is a {type(row).__name__}")
                except (ValueError, RecursionError) as error:
                    raise UsageError(
                        "this line is not a JSON object",
                        where=f"{path}:{number}",
                        why=first_line(error),
                        hint='one object on each line, as in {"text": "..."} or {"input_ids": [1, 2, 3]}',
                    ) from None
                yield f"{path}:{number}", row
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the file cannot be read", where=path, why=error, hint="a text file in UTF-8") from None


def labelled(
    items: Iterable[tuple[str, Any]], texts: Texts, images: Images, classes: Classes
) -> Iterator[tuple[list[Tensor], Tensor | UsageError | None]]:
    """Samples and their labels from pairs of where an item stands and the item: what one call takes, a text or a picture, or
    such a one and its label. What is blank is left out."""
    for where, item in items:
        item, label = apart(item, texts.inputs)
        sample = sample_of(item, where, texts, images)
        if sample is not None:
            yield sample, classes.label(label, sample, texts.inputs, where)


def sample_of(item: Any, where: str, texts: Texts, images: Images) -> list[Tensor] | None:
    """The inputs that an item without label stands for, None for a blank text."""
    inputs = texts.inputs
    if isinstance(item, Mapping) and not set(item) & set(inputs.names):
        if pictures := [value for value in item.values() if is_picture(value)]:
            item = pictures[0]
        elif "text" in item:
            item = item["text"]
            if not isinstance(item, str):
                raise UsageError(f'"text" is of the type {type(item).__name__}', where=where, hint="give a string")
    if isinstance(item, str):
        return texts.sample(item, where) if item.strip() else None
    if is_picture(item):
        return images.sample(item, where)
    if isinstance(item, Mapping):
        # Tokenizers give it unasked.
        taken = {k: v for k, v in item.items() if k != "token_type_ids" or k in inputs.names}
        return inputs.sample((), {k: inputs.tensor(k, v, where) for k, v in taken.items()}, where)
    if is_numbers(item) or isinstance(item, np.ndarray):
        name = "input_ids" if "input_ids" in inputs.names else inputs.names[0]
        return inputs.sample((), {name: inputs.tensor(name, item, where)}, where)
    if isinstance(item, (Tensor, tuple, list)):
        args = (item,) if isinstance(item, Tensor) else tuple(item)
        return inputs.sample(tuple(torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in args), {}, where)
    raise UsageError(
        f"a sample cannot be of the type {type(item).__name__}", where=where, hint="a tensor, a tuple, a dict or a text"
    )
