"""The tokenizer of a model (tokenizer.json) as the keys of a GGUF file.

llama.cpp has its own tokenizers: byte-level BPE, whose rule for cutting a text into words it knows by a name, and
SentencePiece's BPE with bytes for what has no token. Others are not held, and the file is then for token numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxc.safety import parse_json

# How a text is cut into words -> what llama.cpp calls it. The patterns are those of tokenizer.json files.
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {_CASELESS + r"\p{N}" + _REST: "qwen2", _CASELESS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
_GPT2 = "gpt-2"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """model: what llama.cpp calls the tokenizer; pre: how it cuts words; tokens and types of `rows` numbers; scores or merges;
    ids: bos, eos, ... -> number; prefix: whether a space is put before a text; why_not: why there is none."""

    model: str = "no_vocab"
    pre: str | None = None
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    starts_with_bos: bool = False
    prefix: bool | None = None
    chat_template: str | None = None
    why_not: str | None = None


def vocabulary(files: Mapping[str, Path | bytes], config: Any, rows: int) -> Vocabulary:
    """Of the model's `files`, for an embedding of so many `rows`."""
    if "tokenizer.json" not in files:
        return Vocabulary(why_not="the model has no tokenizer.json")
    content = parse_json(_bytes(files["tokenizer.json"]), where="tokenizer.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        return Vocabulary(why_not=f"llama.cpp is given BPE tokenizers, and this one is {model.get('type')}")
    numbered = {number: token for token, number in model["vocab"].items()}
    added = {each["id"]: each for each in content.get("added_tokens") or []}
    numbered |= {number: each["content"] for number, each in added.items()}
    if len(numbered) and max(numbered) >= rows:
        return Vocabulary(why_not=f"its token {max(numbered)} is beyond the {rows} rows of the embedding")
    found = Vocabulary(ids=_ids(config))
    for number in range(rows):
        token = numbered.get(number)
        found.tokens.append(f"[PAD{number}]" if token is None else token)
        found.types.append(_type(token, added.get(number), model.get("unk_token")))
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    steps = list(_steps(content.get("pre_tokenizer")))
    if any(step.get("type") == "ByteLevel" for step in steps):
        found.model, found.pre = "gpt2", _words(steps)
        found.merges = [f"{left} {right}" for left, right in merges]
        if found.pre is None or not merges:
            why = "it has no merges" if found.pre else "llama.cpp has no name known here for how it cuts words"
            return Vocabulary(why_not=why)
    elif model.get("byte_fallback"):
        # SentencePiece merges first what has the highest score: here what is merged first.
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        found.model, found.pre, found.prefix = "llama", "default", _has_prefix(content)
        found.scores = [-float(ranks[token]) if token in ranks else -1e6 for token in found.tokens]
    else:
        return Vocabulary(why_not="it is BPE without bytes for what has no token")
    found.starts_with_bos = _starts_with(content, found.ids.get("bos"))
    found.chat_template = _chat_template(files)
    return found


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _ids(config: Any) -> dict[str, int]:
    found = {}
    for name in ("bos", "eos", "pad"):
        number = getattr(config, f"{name}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            found[name] = number
    return found


def _type(token: str | None, added: Mapping[str, Any] | None, unknown: str | None) -> int:
    if token is None:
        return _UNUSED
    if token == unknown:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added.get("special") else _USER
    return _BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else _NORMAL


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence of normalizers or of what cuts words."""
    if not step:
        return
    inner = step.get("pretokenizers") or step.get("normalizers")
    if step.get("type") == "Sequence" and inner:
        for each in inner:
            yield from _steps(each)
    else:
        yield step


def _words(steps: list[Mapping[str, Any]]) -> str | None:
    byte_level = next(step for step in steps if step.get("type") == "ByteLevel")
    others = [step for step in steps if step is not byte_level]
    if byte_level.get("use_regex", True):
        return _GPT2 if not others and not byte_level.get("add_prefix_space") else None
    if len(others) == 1 and others[0].get("type") == "Split":
        return _WORDS.get((others[0].get("pattern") or {}).get("Regex"))
    return None


def _has_prefix(content: Mapping[str, Any]) -> bool:
    normalizers = list(_steps(content.get("normalizer")))
    metaspace = next((s for s in _steps(content.get("pre_tokenizer")) if s.get("type") == "Metaspace"), None)
    spaced = metaspace is not None and metaspace.get("prepend_scheme", "always") != "never"
    return spaced or any(step.get("type") == "Prepend" for step in normalizers)


def _starts_with(content: Mapping[str, Any], bos: int | None) -> bool:
    from tokenizers import Tokenizer

    numbers = Tokenizer.from_str(json.dumps(content)).encode("a").ids
    return bos is not None and numbers[:1] == [bos]


def _chat_template(files: Mapping[str, Path | bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return _bytes(files["chat_template.jinja"]).decode()
    if "tokenizer_config.json" not in files:
        return None
    template = parse_json(_bytes(files["tokenizer_config.json"]), where="tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
