"""Datasets by name, as the library datasets loads them: from its hub, or from a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxc.data.text import spread
from fxc.errors import UsageError, first_line

PREFIX = "datasets:"


class Rows:
    """(where it stands, row) of the rows at these places of a dataset, each read when it is asked for."""

    def __init__(self, name: str, dataset: Any, places: Sequence[int]) -> None:
        self.name, self.dataset, self.places = name, dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((f"{self.name}, row {at}", self.dataset[at]) for at in self.places)


def is_dataset(data: Any) -> bool:
    return isinstance(data, (str, Path)) and str(data).startswith(PREFIX)


def dataset_rows(name: str, limit: int) -> Rows:
    """At most `limit` rows from all over of "datasets:NAME", "datasets:NAME:SPLIT" or "datasets:NAME:CONFIG:SPLIT"; the split
    is "train" where none is said. Raises `UsageError` where the library or the dataset is not there."""
    path, *rest = str(name).removeprefix(PREFIX).split(":")
    if not path or len(rest) > 2:
        hint = "datasets:NAME, datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT"
        raise UsageError("this names no dataset", where=name, hint=hint)
    split, config = (rest or ["train"])[-1], rest[0] if len(rest) == 2 else None
    try:
        dataset = library().load_dataset(path, config, split=split)
    # Whatever it raises of a name, a network, a disk or a file is said.
    except Exception as error:
        hint = "is its name right, and can the hub be reached? A folder of files works too: datasets:./FOLDER"
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError("the dataset cannot be loaded", where=name, why=why, hint=hint) from error
    return Rows(str(name), dataset, spread(range(len(dataset)), limit))


def library() -> Any:
    """The module datasets. Raises `UsageError` where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UsageError("reading a dataset by name needs the library datasets", hint="pip install datasets") from None
    return datasets
