"""Rows: the lines of a .jsonl file, or the items of an iterable, each of them what one call takes or a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.inputs import Inputs, is_numbers
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


def samples_of(items: Iterable[tuple[str, Any]], inputs: Inputs, texts: Texts) -> Iterator[list[Tensor]]:
    """Samples from pairs of where an item stands and the item: what one call takes, or a text."""
    for where, item in items:
        if isinstance(item, Mapping) and "text" in item and not set(item) & set(inputs.names):
            item = item["text"]
            if not isinstance(item, str):
                raise UsageError(f'"text" is of the type {type(item).__name__}', where=where, hint="give a string")
        if isinstance(item, str):
            if item.strip():
                yield texts.sample(item, where)
        elif isinstance(item, Mapping):
            # Tokenizers give it unasked.
            taken = {k: v for k, v in item.items() if k != "token_type_ids" or k in inputs.names}
            yield inputs.sample((), {k: inputs.tensor(k, v, where) for k, v in taken.items()}, where)
        elif is_numbers(item) or isinstance(item, np.ndarray):
            name = "input_ids" if "input_ids" in inputs.names else inputs.names[0]
            yield inputs.sample((), {name: inputs.tensor(name, item, where)}, where)
        elif isinstance(item, (Tensor, tuple, list)):
            args = (item,) if isinstance(item, Tensor) else tuple(item)
            yield inputs.sample(tuple(torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in args), {}, where)
        else:
            raise UsageError(
                f"a sample cannot be of the type {type(item).__name__}",
                where=where,
                hint="a tensor, a tuple, a dict or a text",
            )
