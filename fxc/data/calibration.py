"""Data to learn from: from a text, a .jsonl file, a folder of images, a dataset or a Python iterable to inputs of a program."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fxc.data.hub import dataset_rows, is_dataset, library
from fxc.data.images import SUFFIXES, Images, images_in
from fxc.data.inputs import Inputs
from fxc.data.labels import Classes, Samples, gathered
from fxc.data.rows import labelled, rows_of
from fxc.data.text import Texts, spread
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.progress import Track, untracked

LIMIT = 64
TRAINING = 4096
WINDOW = 128
EVERY = 8
HELD_OUT = 16

_NOT_TEXT = {
    ".json": "write one JSON object on each line of a .jsonl file",
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow"), 'write its rows to a .jsonl file, as in {"text": "..."}'),
    **dict.fromkeys((".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors", ".pkl"), "load it in Python: calib=[tensor, ...]"),
    **dict.fromkeys((".zip", ".gz", ".tar", ".tgz", ".zst", ".xz"), "unpack it first"),
    **dict.fromkeys(SUFFIXES, "name the folder that the images are in"),
}


def calibration_samples(
    program: Program,
    data: Any,
    *,
    folder: Path | None = None,
    config: Any = None,
    limit: int = LIMIT,
    window: int = WINDOW,
    track: Track = untracked,
    what: str = "calibration",
) -> Samples:
    """At most `limit` samples, each the flat input tensors of `program`; the same for the same data.

    data: the path of a text file, whose windows of `window` tokens are taken from all over it; of a .jsonl file, whose rows
    hold {"text": ...}, or inputs by name as nested lists of numbers, with or without a batch dimension; of a folder of
    images; an iterable of what one call takes (a tensor, a tuple, a dict), of texts, or of Pillow's images; or
    "datasets:NAME", "datasets:NAME:SPLIT" or "datasets:NAME:CONFIG:SPLIT" for what the library datasets loads by that name.
    Batches are kept as given, all else is a batch of one. A single tensor or dict is one sample. Of rows and iterables the
    first `limit` are read, of texts, images and datasets some from all over.
    Labels come with rows and dicts that have "label" or "labels", a number or a name in the configuration's label2id, with
    pairs (inputs, label), and with images in one folder a class: see `Classes`. They are no inputs, and may be missing or
    wrong until something needs them: see `Samples`.
    folder: where the tokenizer and the image processor are, by default where `config` says that the model came from.
    A decoder gets a mask, positions and an empty cache; other inputs with a default may be left out. track: shows progress;
    what: what the data is for, in words.

    Raises `UsageError` for data that is missing, empty, of the wrong kind, or that the program cannot take.
    """
    check_data(data, what)
    check_amount(limit, window)
    made, count = _read(program, data, folder or _origin(config), config, limit, window)
    samples = gathered(track(itertools.islice(made, limit), f"reading {what} samples", min(count, limit)))
    if not samples:
        where = data if isinstance(data, (str, Path)) else None
        raise UsageError(
            f"the {what} data is empty", where=where, hint="give at least one sample; a generator is used up once"
        )
    return samples


def _read(
    program: Program, data: Any, folder: Path | None, config: Any, limit: int, window: int
) -> tuple[Iterator[tuple[list[Tensor], Tensor | UsageError | None]], int]:
    """The samples with their labels, and how many there may be: by what the data is, texts, images, or rows."""
    inputs = Inputs(program, config)
    texts, images, classes = Texts(inputs, folder, window), Images(inputs, folder), Classes(config)
    if is_dataset(data):
        rows = dataset_rows(str(data), limit)
        return labelled(rows, texts, images, classes), len(rows)
    if not isinstance(data, (str, Path)):
        items = [data] if isinstance(data, (Tensor, np.ndarray, Mapping)) else data
        count = len(items) if isinstance(items, Sized) else limit
        return labelled(((f"sample {n}", item) for n, item in enumerate(items, 1)), texts, images, classes), count
    path = Path(data)
    if path.is_dir():
        paths = images_in(path)
        named, paths = classes.of_folders(path, paths), spread(paths, limit)
        made = zip(images.samples(paths), paths)
        return ((sample, classes.label(named.get(each), sample, inputs, each)) for sample, each in made), len(paths)
    if path.suffix.lower() == ".jsonl":
        return labelled(rows_of(path), texts, images, classes), limit
    windows = texts.windows(path, limit)
    return ((texts.sample_of(each, data), None) for each in windows), len(windows)


def check_amount(limit: int, window: int) -> None:
    """Raises `UsageError` for a number of samples, or of tokens in a window, that is none."""
    if limit < 1 or window < 2:
        raise UsageError(f"{limit} samples of {window} tokens", hint="at least one sample, and windows of two tokens")


def held_out(samples: Sequence[list[Tensor]]) -> tuple[Samples, Samples]:
    """The samples to learn from, and those to judge by: of eight or more every eighth, and of many `HELD_OUT` from all over."""
    step, samples = max(EVERY, -(-len(samples) // HELD_OUT)), Samples.of(samples)
    places = range(len(samples))
    return samples.take([at for at in places if (at + 1) % step]), samples.take([at for at in places if not (at + 1) % step])


def check_data(data: Any, what: str = "calibration") -> None:
    """What can be checked of data without a model: that it exists and is of a kind that can be read. what: what it is for."""
    if is_dataset(data):
        library()
    elif isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            images_in(path)
        elif not path.is_file():
            raise UsageError(
                f"there is no such {what} data",
                where=data,
                hint="a text file, a .jsonl file, a folder of images or datasets:NAME; a text itself goes into a list: "
                "['text', ...]",
            )
        elif hint := _NOT_TEXT.get(path.suffix.lower()):
            raise UsageError(f"a {path.suffix} file is no {what} data", where=data, hint=hint)
    elif not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise UsageError(f"{what} data cannot be of the type {type(data).__name__}", hint="a path, or an iterable of inputs")


def _origin(config: Any) -> Path | None:
    """The folder that a model was loaded from, by its configuration, if it is there."""
    name = getattr(config, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None
