"""The files that belong to a model besides its weights and its code, which a compiled model keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fxc.data.text import VOCABULARIES
from fxc.errors import InputRefused, UsageError, first_line
from fxc.safety import check_contained, check_json_size, read_json, safetensors_header

TOKENIZER = (
    *VOCABULARIES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges*.txt", "normalizer.json",
    "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json", "chat_template*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "image_processor*.json")
# What sentence-transformers does after the model: pooling, normalizing, a dense layer. Pickles do not travel.
_SENTENCES = (
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
    "[1-9]*_*/model.safetensors",
)  # fmt: skip
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER, *_PROCESSOR, *_SENTENCES)


def of_folder(folder: Path) -> dict[str, Path]:
    """Relative name -> file, in order. Raises `InputRefused` for a link that leads out of the folder, for JSON of a size that
    no companion has and for damaged weights."""
    found = {p.relative_to(folder).as_posix(): p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()}
    for path in found.values():
        check_contained(folder, path)
        if path.suffix == ".json":
            check_json_size(path)
        if path.suffix == ".safetensors":
            safetensors_header(path)
    return dict(sorted(found.items()))


def of_tokenizer(tokenizer: Any) -> dict[str, Path | bytes]:
    """The files of a tokenizer (or a processor), which has `save_pretrained` or is a folder. Raises `UsageError` for what is
    neither, and where it does not save itself."""
    if isinstance(tokenizer, (str, Path)):
        files = of_folder(Path(tokenizer).expanduser()) if Path(tokenizer).expanduser().is_dir() else {}
        if not has_vocabulary(files):
            raise UsageError("there is no tokenizer", where=tokenizer, hint="give a folder that holds a tokenizer.json")
        return {name: path for name, path in files.items() if is_tokenizer_file(name)}
    if not hasattr(tokenizer, "save_pretrained") or hasattr(tokenizer, "state_dict"):
        raise UsageError(
            f"a {type(tokenizer).__name__} is not a tokenizer",
            where="tokenizer",
            hint="give what AutoTokenizer.from_pretrained returns, or a folder that holds one",
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise UsageError("the tokenizer does not save itself", where="tokenizer", why=first_line(error)) from error
        return {name: path.read_bytes() for name, path in of_folder(Path(folder)).items() if name != "config.json"}


def with_tokenizer(files: Mapping[str, Path | bytes], tokenizer: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """`files` with those of a `tokenizer` in place of the one that they hold."""
    others = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
    return dict(sorted((others | tokenizer).items()))


@contextmanager
def laid_out(files: Mapping[str, Path | bytes]) -> Iterator[Path]:
    """A folder that holds `files` until the block ends, for what reads folders only."""
    with tempfile.TemporaryDirectory() as folder:
        write(files, Path(folder))
        yield Path(folder)


def write(files: Mapping[str, Path | bytes], folder: Path) -> None:
    for name, file in sorted(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file if isinstance(file, bytes) else Path(file).read_bytes())


def is_tokenizer_file(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER)


def is_processor_file(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _PROCESSOR)


def has_vocabulary(names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in VOCABULARIES)


def is_added_tokenizer(folder: Path, added: Iterable[str]) -> bool:
    """Whether the files `added` to an artifact that came without a tokenizer are one: it was put there afterwards."""
    added = set(added)
    if not has_vocabulary(added) or not all(map(is_tokenizer_file, added)):
        return False
    for name in added:
        check_contained(folder, folder / name)
    try:
        return "tokenizer.json" not in added or "model" in read_json(folder / "tokenizer.json")
    except InputRefused:
        return False
