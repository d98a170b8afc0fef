"""Texts: their tokenizer, their tokens, and windows of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.data.inputs import Inputs
from fxc.errors import UsageError
from fxc.safety import listed, read_json

# Without one of these transformers makes an empty tokenizer of some kinds.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model*", "vocab*.json", "vocab*.txt", "*_vocab.json", "spiece.model", "sentencepiece*.model",
    "*.spm", "spm*.model", "*.tiktoken", "tekken.json", "*.tokenizer", "bpe.codes", "dict.txt",
)  # fmt: skip
# What more there is of a text would take time and change little.
_MOST_CHARACTERS = 1 << 24


def tokenizer_of(folder: Any) -> Any:
    """The tokenizer in a folder. Raises `UsageError` where there is none that transformers can read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is None:
        hint = "compile it with its tokenizer: fxc.optimize(model, tokenizer=...)"
        raise UsageError("the model came without its tokenizer", hint=hint)
    hint = "put its tokenizer into the folder, as tokenizer.save_pretrained(folder) does"
    missing = UsageError("the model has no tokenizer", where=folder, hint=hint)
    if not any(True for name in VOCABULARIES for _ in Path(folder).glob(name)):
        raise missing
    try:
        kind = PreTrainedTokenizerFast if _declares_plain_tokenizer(Path(folder)) else AutoTokenizer
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing.why = str(error).strip().partition("\n")[0] or None
        raise missing from error


def _declares_plain_tokenizer(folder: Path) -> bool:
    """Whether the folder says that its tokenizer.json is all there is to its tokenizer. For some kinds of model AutoTokenizer
    goes by the kind instead and splits the text in another way than the model was trained with."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return read_json(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text, [T] int64, with whatever the tokenizer puts around one."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def windows(tokens: Tensor, window: int, rows: int = 1, limit: int | None = None) -> list[Tensor]:
    """`tokens` [T] cut into windows that do not overlap, as batches [at most `rows`, window]; the shorter last one is a
    batch of its own, unless it is a single token, of which nothing can be scored. limit: at most so many windows."""
    cut = [w for w in tokens.split(window)[:limit] if len(w) > 1]
    full = [w for w in cut if len(w) == window]
    batches = [torch.stack(full[i : i + rows]) for i in range(0, len(full), rows)]
    return batches + [w[None] for w in cut if len(w) < window]


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, from all over."""
    count = len(items)
    return [items[i * count // limit] for i in range(limit)] if count > limit else list(items)


def _text_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=path, why=error, hint="a text file in UTF-8") from None


@dataclass(frozen=True)
class Texts:
    """Makes inputs of texts, in windows of at most `window` tokens. folder: where the tokenizer is, if that is known."""

    inputs: Inputs
    folder: Path | None
    window: int

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
        most = [self.window, self.inputs.longest, getattr(self.tokenizer, "model_max_length", None)]
        room = int(min(m for m in most if m)) - len(self.around[0]) - len(self.around[1])
        if room < 1:
            raise UsageError(f"a window of {self.window} tokens has no room for text", hint="a larger window")
        return room

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def sample(self, text: str, where: object) -> list[Tensor]:
        """One text, as much of its beginning as goes into a window."""
        self._check_reads(where)
        return self.sample_of(self.tokens(text)[: self.room], where)

    def windows(self, path: Path, limit: int) -> list[list[int]]:
        """Windows of tokens that do not overlap; the shorter last one only where it is the only one."""
        self._check_reads(path)
        tokens = self.tokens(_text_of(path))
        cut = [tokens[i : i + self.room] for i in range(0, len(tokens), self.room)]
        if len(cut) > 1 and len(cut[-1]) < self.room:
            cut.pop()
        return spread(cut, limit)

    def sample_of(self, tokens: list[int], where: object) -> list[Tensor]:
        before, after = self.around
        ids = torch.tensor([[*before, *tokens, *after]], dtype=torch.int64)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return self.inputs.sample((), {name: tensor for name, tensor in made.items() if name in self.inputs.names}, where)

    def _check_reads(self, where: object) -> None:
        if "input_ids" not in self.inputs.names:
            images = "pixel_values" in self.inputs.names
            raise UsageError(
                f"this model does not read text: it takes {listed(self.inputs.names)}",
                where=where,
                hint="name a folder of images"
                if images
                else "give a .jsonl file of its inputs by name, or an iterable of tensors",
            )
        self.inputs.check_covers(["input_ids", "attention_mask", "token_type_ids"], "text", where)
