"""Calibration data: from a text, a .jsonl file, a folder of images or a Python iterable to inputs of a program."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.decoder import decoder_inputs
from fxc.data.tables import table_size
from fxc.errors import UsageError, first_line
from fxc.ir.binding import bind
from fxc.ir.cache import is_causal_lm, is_past
from fxc.ir.program import Program
from fxc.measure.evaluate import tokenizer_of
from fxc.progress import Track, untracked
from fxc.safety import listed, read_json

LIMIT = 64
WINDOW = 128

# What more there is of a text would take time and change little.
_MOST_CHARACTERS = 1 << 24
_IMAGES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_NOT_TEXT = {
    ".json": "write one JSON object on each line of a .jsonl file",
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow"), 'write its rows to a .jsonl file, as in {"text": "..."}'),
    **dict.fromkeys((".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors", ".pkl"), "load it in Python: calib=[tensor, ...]"),
    **dict.fromkeys((".zip", ".gz", ".tar", ".tgz", ".zst", ".xz"), "unpack it first"),
    **dict.fromkeys(_IMAGES, "name the folder that the images are in"),
}
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def calibration_samples(
    program: Program,
    data: Any,
    *,
    folder: Path | None = None,
    config: Any = None,
    limit: int = LIMIT,
    window: int = WINDOW,
    track: Track = untracked,
) -> list[list[Tensor]]:
    """At most `limit` samples, each the flat input tensors of `program`; the same for the same data.

    data: the path of a text file, whose windows of `window` tokens are taken from all over it; of a .jsonl file, whose rows
    hold {"text": ...}, or inputs by name as nested lists of numbers, with or without a batch dimension; of a folder of
    images; or an iterable of what one call takes (a tensor, a tuple, a dict), or of texts. Batches are kept as given, all
    else is a batch of one. A single tensor or dict is one sample. Of rows and iterables the first `limit` are read.
    folder: where the tokenizer and the image processor are, by default where `config` says that the model came from.
    A decoder gets a mask, positions and an empty cache; other inputs with a default may be left out. track: shows progress.

    Raises `UsageError` for data that is missing, empty, of the wrong kind, or that the program cannot take.
    """
    check_data(data)
    if limit < 1 or window < 2:
        raise UsageError(f"{limit} samples of {window} tokens", hint="at least one sample, and windows of two tokens")
    reader = _Reader(program, folder or _origin(config), config, window)
    count = limit
    if not isinstance(data, (str, Path)):
        items = [data] if isinstance(data, (Tensor, np.ndarray, Mapping)) else data
        count = len(items) if isinstance(items, Sized) else limit
        made = reader.items((f"calibration sample {n}", item) for n, item in enumerate(items, 1))
    elif Path(data).is_dir():
        paths = _spread(_images_in(Path(data)), limit)
        made, count = reader.images(paths), len(paths)
    elif Path(data).suffix.lower() == ".jsonl":
        made = reader.items(_rows(Path(data)))
    else:
        windows = reader.windows(Path(data), limit)
        made, count = (reader.tokens_sample(each, data) for each in windows), len(windows)
    samples = list(track(itertools.islice(made, limit), "reading calibration samples", min(count, limit)))
    if not samples:
        where = data if isinstance(data, (str, Path)) else None
        raise UsageError(
            "the calibration data is empty", where=where, hint="give at least one sample; a generator is used up once"
        )
    return samples


def check_data(data: Any) -> None:
    """What can be checked of calibration data without a model: that it exists and is of a kind that can be read."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            _images_in(path)
        elif not path.is_file():
            raise UsageError(
                "there is no such calibration data",
                where=data,
                hint="a text file, a .jsonl file or a folder of images; a text itself goes into a list: calib=['text', ...]",
            )
        elif hint := _NOT_TEXT.get(path.suffix.lower()):
            raise UsageError(f"a {path.suffix} file is no calibration data", where=data, hint=hint)
    elif not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise UsageError(
            f"calibration data cannot be of the type {type(data).__name__}", hint="a path, or an iterable of inputs"
        )


@dataclass(frozen=True)
class _Reader:
    """Makes samples for one program. folder: where its tokenizer and image processor are, if that is known."""

    program: Program
    folder: Path | None
    config: Any
    window: int

    @cached_property
    def names(self) -> list[str]:
        return [declared.name for declared in self.program.signature.inputs]

    @cached_property
    def causal(self) -> bool:
        return is_causal_lm(self.program)

    @cached_property
    def longest(self) -> int | None:
        """The most tokens that the model takes."""
        text = getattr(self.config, "text_config", None) or self.config
        return getattr(text, "max_position_embeddings", None)

    @cached_property
    def tables(self) -> dict[str, int]:
        """Input -> the size of the smallest table that its integers index."""
        found = {n: table_size(node) for n, node in zip(self.names, self.program.placeholders, strict=True)}
        return {name: size for name, size in found.items() if size is not None}

    # ---------------------------------------------------------------------------------------------------- any inputs

    def items(self, items: Iterable[tuple[str, Any]]) -> Iterator[list[Tensor]]:
        """Samples from pairs of where an item stands and the item."""
        for where, item in items:
            if isinstance(item, Mapping) and "text" in item and not set(item) & set(self.names):
                item = item["text"]
                if not isinstance(item, str):
                    raise UsageError(f'"text" is of the type {type(item).__name__}', where=where, hint="give a string")
            if isinstance(item, str):
                if item.strip():
                    yield self.text(item, where)
            elif isinstance(item, Mapping):
                # Tokenizers give it unasked.
                taken = {k: v for k, v in item.items() if k != "token_type_ids" or k in self.names}
                yield self.sample((), {k: self.tensor(k, v, where) for k, v in taken.items()}, where)
            elif _is_numbers(item) or isinstance(item, np.ndarray):
                name = "input_ids" if "input_ids" in self.names else self.names[0]
                yield self.sample((), {name: self.tensor(name, item, where)}, where)
            elif isinstance(item, (Tensor, tuple, list)):
                args = (item,) if isinstance(item, Tensor) else tuple(item)
                yield self.sample(tuple(torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in args), {}, where)
            else:
                raise UsageError(
                    f"a sample cannot be of the type {type(item).__name__}",
                    where=where,
                    hint="a tensor, a tuple, a dict or a text",
                )

    def tensor(self, name: str, value: Any, where: str) -> Any:
        """`value` for the input `name`: lists of numbers become a tensor, with a batch dimension if that is what lacks."""
        if isinstance(value, np.ndarray):
            return torch.as_tensor(value)
        if not _is_numbers(value):
            return value
        try:
            tensor = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UsageError(
                f"{name} does not make a tensor",
                where=where,
                why=first_line(error),
                hint="lists of the same length, of numbers alone",
            ) from None
        if name not in self.names:
            return tensor
        wanted = self.program.placeholders[self.names.index(name)].meta["val"]
        if wanted.is_floating_point() or tensor.numel() == 0 or (tensor.dtype == torch.int64 and wanted.dtype == torch.bool):
            tensor = tensor.to(wanted.dtype)
        return tensor[None] if tensor.ndim == wanted.ndim - 1 else tensor

    def sample(self, args: tuple, kwargs: dict[str, Any], where: object) -> list[Tensor]:
        try:
            if self.causal:
                args, kwargs = (), self._with_cache(args, kwargs)
            flat = bind(self.program, args, kwargs)
            self._check(flat)
        except UsageError as error:
            hint = error.hint or "give what the model is called with, and no labels, with a batch dimension"
            raise UsageError(error.what, where=where, why=error.why, hint=hint) from None
        return [tensor.detach().cpu() for tensor in flat]

    def _with_cache(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder with what they leave out: a mask, positions and an empty cache."""
        given = dict(zip(self.program.metadata.get("parameters", []), args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        ids = given.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim != 2:
            raise UsageError(f"input_ids has {ids.ndim} dimensions and must have 2", hint="give [batch, tokens]")
        if not isinstance(ids, Tensor) or any(is_past(name) for name in given):
            if len(args) > 0 and "input_ids" not in given:
                raise UsageError("the input input_ids is missing", hint="give a dict of the inputs by name")
            return given  # as it is: complete, or with a fault that binding names
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape != ids.shape:
            raise UsageError(f"attention_mask is {list(mask.shape)} and must be {list(ids.shape)}, as input_ids")
        filled = decoder_inputs(self.program, ids, mask if isinstance(mask, Tensor) else None)
        return dict(zip(self.names, filled, strict=True)) | given

    def _check(self, flat: list[Tensor]) -> None:
        for name, tensor in zip(self.names, flat, strict=True):
            if tensor.numel() == 0 and not is_past(name):
                raise UsageError(f"{name} is empty: {list(tensor.shape)}", hint="leave samples without content out")
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise UsageError(f"{name} holds NaN", hint="repair or leave out the sample")
            size = self.tables.get(name)
            wrong = [] if size is None else tensor[(tensor < 0) | (tensor >= size)].tolist()
            if wrong:
                raise UsageError(
                    f"{name} holds {wrong[0]}, and the model knows 0 to {size - 1}",
                    hint="the tokenizer belongs to another model, or labels were given as inputs",
                )
            if name == "input_ids" and self.longest and tensor.ndim == 2 and tensor.shape[1] > self.longest:
                raise UsageError(
                    f"{tensor.shape[1]} tokens, and the model takes at most {self.longest}",
                    hint="cut the sample into shorter ones",
                )

    def _check_covers(self, given: Iterable[str], what: str, where: object) -> None:
        """Refuse data of one kind for a model that takes more."""
        required = {declared.name for declared in self.program.signature.inputs if declared.default is None}
        missing = sorted(required - set(given))
        if missing and not self.causal:
            raise UsageError(
                f"{what} alone is too little for this model: it takes {listed(missing)} too",
                where=where,
                hint="in Python, give an iterable of dicts with all of its inputs, as in calib=[{'input_ids': ids, ...}, ...]",
            )

    # --------------------------------------------------------------------------------------------------------- texts

    @cached_property
    def tokenizer(self) -> Any:
        if self.folder is None:
            raise UsageError(
                "the calibration text cannot be cut into tokens: this model came without its tokenizer",
                hint="give tokens, as in calib=[{'input_ids': tensor}, ...], "
                "or compile with its tokenizer: fxc.optimize(model, tokenizer=...)",
            )
        return tokenizer_of(self.folder)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        bare, whole = self.tokens("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    @cached_property
    def room(self) -> int:
        """How many tokens of a text go into one window."""
        most = [self.window, self.longest, getattr(self.tokenizer, "model_max_length", None)]
        room = int(min(m for m in most if m)) - len(self.around[0]) - len(self.around[1])
        if room < 1:
            raise UsageError(f"a window of {self.window} tokens has no room for text", hint="a larger window")
        return room

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, text: str, where: object) -> list[Tensor]:
        self._check_reads_text(where)
        return self.tokens_sample(self.tokens(text)[: self.room], where)

    def windows(self, path: Path, limit: int) -> list[list[int]]:
        """Windows of tokens that do not overlap; the shorter last one only where it is the only one."""
        self._check_reads_text(path)
        tokens = self.tokens(_text_of(path))
        cut = [tokens[i : i + self.room] for i in range(0, len(tokens), self.room)]
        if len(cut) > 1 and len(cut[-1]) < self.room:
            cut.pop()
        return _spread(cut, limit)

    def tokens_sample(self, tokens: list[int], where: object) -> list[Tensor]:
        before, after = self.around
        ids = torch.tensor([[*before, *tokens, *after]], dtype=torch.int64)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return self.sample((), {name: tensor for name, tensor in made.items() if name in self.names}, where)

    def _check_reads_text(self, where: object) -> None:
        if "input_ids" not in self.names:
            images = "pixel_values" in self.names
            raise UsageError(
                f"this model does not read text: it takes {listed(self.names)}",
                where=where,
                hint="name a folder of images"
                if images
                else "give a .jsonl file of its inputs by name, or an iterable of tensors",
            )
        self._check_covers(["input_ids", "attention_mask", "token_type_ids"], "text", where)

    # -------------------------------------------------------------------------------------------------------- images

    def images(self, paths: list[Path]) -> Iterator[list[Tensor]]:
        if "pixel_values" not in self.names:
            text = "input_ids" in self.names
            raise UsageError(
                f"this model does not take images: it takes {listed(self.names)}",
                where=paths[0].parent,
                hint="name a text file" if text else "in Python, give an iterable of its inputs: calib=[tensor, ...]",
            )
        self._check_covers(["pixel_values", "pixel_mask"], "a folder of images", paths[0].parent)
        for path in paths:
            made = self._pixels(path)
            yield self.sample((), {k: v for k, v in made.items() if k in self.names and isinstance(v, Tensor)}, path)

    def _pixels(self, path: Path) -> Mapping[str, Any]:
        image = _pillow()
        try:
            with image.open(path) as opened:
                picture = opened.convert("L" if self.target[0] == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            why = first_line(error)
            raise UsageError("this is not an image that can be read", where=path, why=why, hint="take it out") from None
        try:
            if self.processor is None:
                return {"pixel_values": plain_pixels(self.settings, picture, *self.target[1:])}
            return self.processor(images=picture, return_tensors="pt")
        except (ImportError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise UsageError(
                "the model's image processor cannot use this image",
                where=path,
                why=first_line(error),
                hint=f"see {self.folder}; or prepare the images in Python: calib=[tensor, ...]",
            ) from None

    @cached_property
    def target(self) -> tuple[int, int, int]:
        """Channels, height and width that the program was captured for."""
        shape = self.program.placeholders[self.names.index("pixel_values")].meta["val"].shape
        if len(shape) != 4:
            raise UsageError(
                f"pixel_values has {len(shape)} dimensions, so that an image alone is no input",
                hint="prepare the images in Python: calib=[{'pixel_values': tensor}, ...]",
            )
        return tuple(size if isinstance(size, int) else int(size.node.hint) for size in shape[1:])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder says of preparing images."""
        path = next((self.folder / n for n in _PROCESSORS if self.folder and (self.folder / n).is_file()), None)
        if path is None:
            raise UsageError(
                "the model came without an image processor",
                where=self.folder,
                hint="put its preprocessor_config.json into the folder, or prepare the images in Python: calib=[tensor, ...]",
            )
        settings = read_json(path)
        return settings.get("image_processor", settings)

    @cached_property
    def processor(self) -> Any:
        """transformers' own image processor, or None where it has none for this folder or needs torchvision for it."""
        from transformers import AutoImageProcessor

        if not self.settings:
            return None
        try:
            return AutoImageProcessor.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def plain_pixels(settings: Mapping[str, Any], picture: Any, height: int, width: int) -> Tensor:
    """[1, channels, H, W] from a picture: resized, cropped and normalized as `settings`, a preprocessor_config.json, says;
    to `height` and `width`, 1/255, mean and deviation 0.5 where it says nothing."""
    if settings.get("do_resize", True):
        size = settings.get("size") or {"height": height, "width": width}
        picture = picture.resize(_resized(size, *picture.size), settings.get("resample", 2))
    if settings.get("do_center_crop", "crop_size" in settings):
        size = settings.get("crop_size") or {"height": height, "width": width}
        wide, high = _resized(size if isinstance(size, Mapping) else {"height": size, "width": size}, *picture.size)
        left, top = (picture.width - wide) // 2, (picture.height - high) // 2
        picture = picture.crop((left, top, left + wide, top + high))
    pixels = torch.from_numpy(np.array(picture)).float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if settings.get("do_rescale", True):
        pixels = pixels * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean, deviation = (
            torch.tensor(settings.get(key, 0.5), dtype=torch.float32).reshape(-1, 1, 1) for key in ("image_mean", "image_std")
        )
        pixels = (pixels - mean) / deviation
    return pixels[None]


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    """(width, height) that `size` asks for: {"height", "width"}, a number (both), or {"shortest_edge"}, in proportion."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(width, height)
        if "longest_edge" in size:
            scale = min(scale, size["longest_edge"] / max(width, height))
        return max(1, int(width * scale)), max(1, int(height * scale))
    return size["width"], size["height"]


def _origin(config: Any) -> Path | None:
    """The folder that a model was loaded from, by its configuration, if it is there."""
    name = getattr(config, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, from all over."""
    count = len(items)
    return [items[i * count // limit] for i in range(limit)] if count > limit else list(items)


def _images_in(folder: Path) -> list[Path]:
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _IMAGES and not p.name.startswith(".") and p.is_file()]
    if not found:
        raise UsageError(
            "there are no images in this folder",
            where=folder,
            hint=f"it may hold {', '.join(sorted(_IMAGES))}; of texts, name one file",
        )
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _text_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=path, why=error, hint="a text file in UTF-8") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
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


def _is_numbers(value: Any) -> bool:
    """Whether `value` is a list, or lists in lists, of numbers, judged by the first."""
    if not isinstance(value, (list, tuple)):
        return False
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float)) or value == []


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("reading images needs Pillow", hint="pip install pillow") from None
    return Image
