"""Inputs to compare two programs on: of a text, or made up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxc.data.decoder import decoder_inputs, without_past
from fxc.data.samples import samples
from fxc.data.text import encode, windows
from fxc.errors import UsageError
from fxc.ir.binding import bind
from fxc.ir.cache import cache_types, empty_cache, has_cache, is_causal_lm, is_seq2seq
from fxc.ir.program import Program


def _sentence(program: Program, tokenizer: Any, sentence: str) -> list[Tensor]:
    """The inputs of an encoder for one sentence."""
    longest = min(getattr(tokenizer, "model_max_length", 512), 512)
    made = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=longest)
    names = {declared.name for declared in program.signature.inputs}
    return bind(program, (), {k: v for k, v in made.items() if k in names})


def inputs_for(
    program: Program, tokenizer: Any, text: str | None, window: int, limit: int | None
) -> tuple[list[list[Tensor]], str]:
    """Sets of inputs to compare two programs on, and what they are: windows of the text for a decoder, its lines for an
    encoder, made-up numbers where there is no text."""
    if text is None:
        return samples(program), "made-up inputs"
    if is_causal_lm(program):
        cut = windows(encode(tokenizer, text), window, 1, limit)
        if not cut:
            raise UsageError("the text is too short")
        return [decoder_inputs(program, ids) for ids in cut], f"{len(cut)} windows of {window} tokens"
    if not any(declared.name == "input_ids" for declared in program.signature.inputs):
        raise UsageError("this model does not read text", hint="leave --text out: made-up inputs are used")
    lines = [line.strip() for line in text.splitlines() if line.strip()][:limit]
    if not lines:
        raise UsageError("the text has no lines")
    return [_sentence(program, tokenizer, line) for line in lines], f"{len(lines)} lines of text"


def for_both(tensors: list[Tensor], program: Program, original: Program) -> tuple[list[Tensor], list[Tensor]]:
    """Flat inputs of `original` as each of the two takes them: a pruned decoder has a smaller cache, and then neither is given
    a past."""
    caches = [[tuple(t.shape[1::2]) for t in cache_types(each)] for each in (program, original)]
    if not has_cache(original) or caches[0] == caches[1]:
        return tensors, tensors
    if is_seq2seq(original):
        plain = without_past(original, tensors)
        return [*plain[: len(plain) - len(caches[1])], *empty_cache(program, len(plain[0]))], plain
    return decoder_inputs(program, tensors[0]), decoder_inputs(original, tensors[0])
