"""Inputs to try a program on, made from nothing but its signature."""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.data.decoder import (
    after_itself,
    decoder_inputs,
    decoder_sample,
    decoder_sample_after_itself,
    without_past,
    written,
)  # fmt: skip
from fxc.data.tables import bound_of
from fxc.ir.cache import is_causal_lm, is_seq2seq
from fxc.ir.program import Program

# More numbers than this are not written into a program's metadata.
_MOST_NUMBERS = 1 << 16


def samples(program: Program) -> list[list[Tensor]]:
    """Sets of input tensors at the sizes of capture and at two others, batch 1 among them; the same for the same program."""
    if is_causal_lm(program):
        return [decoder_sample_after_itself(program, *sizes) for sizes in ((2, 7, 9), (1, 1, 6), (3, 5, 0))]
    made = [_sample(program, *variant) for variant in ((0, 0), (1, 3), (-1, 2))]
    if is_seq2seq(program):
        made = [*(after_itself(program, each) for each in made[:2]), without_past(program, made[2])]
    if kept := program.metadata.get("examples"):
        return [_filled(row, like) for row, like in zip(kept, _like(program, kept, made[0]), strict=True)]
    return made


def keep_examples(program: Program, examples: list[list[Tensor]]) -> None:
    """Write into the metadata the values of inputs that may not be made up: lengths, labels, end tokens, probabilities. Of
    integers and booleans first, of all inputs where that is not enough, of none where random ones do. examples: sets of
    inputs that the model takes, the first of the sizes of capture."""
    expected = _finite(program, examples[0])
    if expected is None or _finite(program, samples(program)[0]) == expected:
        return
    for only_integers in (True, False):
        wanted = [not (only_integers and (t.is_floating_point() or t.is_complex())) for t in examples[0]]
        kept = [t for row in examples for t, is_kept in zip(row, wanted) if is_kept]
        if not kept or any(t.is_complex() for t in kept) or sum(t.numel() for t in kept) > _MOST_NUMBERS:
            continue
        program.metadata["examples"] = [
            [{"shape": list(t.shape), "values": t.flatten().tolist()} if is_kept else None for t, is_kept in zip(row, wanted)]
            for row in examples
        ]
        if _finite(program, samples(program)[0]) == expected:
            return
        del program.metadata["examples"]


def _finite(program: Program, inputs: list[Tensor]) -> int | None:
    """How many of the program's outputs are finite numbers, None where it does not run."""
    try:
        with torch.no_grad():
            return sum(int(t.isfinite().sum()) for t in program.module()(*inputs))
    except Exception:  # any error of an operator is a refusal of these inputs
        return None


def _filled(kept: list[dict | None], like: list[Tensor]) -> list[Tensor]:
    """The kept values, and for inputs without such the tensors in `like`."""
    return [
        torch.tensor(each["values"], dtype=tensor.dtype).reshape(each["shape"]) if each else tensor
        for each, tensor in zip(kept, like, strict=True)
    ]


def _like(program: Program, kept: list[list[dict | None]], first: list[Tensor]) -> list[list[Tensor]]:
    """Random inputs of the sizes that go with each set of kept ones."""
    rows = []
    for known in kept:
        sizes = {}
        for each, node in zip(known, program.placeholders, strict=True):
            if each:
                sizes |= {str(s): n for s, n in zip(node.meta["val"].shape, each["shape"]) if not isinstance(s, int)}
        generator = torch.Generator().manual_seed(1234)
        row = []
        for node, like in zip(program.placeholders, first, strict=True):
            shape = [sizes.get(str(s), n) for s, n in zip(node.meta["val"].shape, like.shape, strict=True)]
            row.append(torch.randn(shape, generator=generator).to(like.dtype))
        rows.append(row)
    return rows


def drawn(program: Program, count: int = 32, seed: int = 0) -> list[list[Tensor]]:
    """`count` sets of inputs, for what has to be judged on many where no data was given; the same for the same program and
    seed. For a causal language model texts that it writes itself, token by token from one at random, so that they are as likely
    as it thinks; for others random numbers at the sizes of capture."""
    if not is_causal_lm(program):
        made = [_sample(program, 0, 0, number) for number in range(seed * count, (seed + 1) * count)]
        if is_seq2seq(program):
            made = [without_past(program, each) for each in made]
        kept = program.metadata.get("examples")
        return [_filled(kept[0], each) for each in made] if kept else made
    # The sizes of capture reach 16 positions; not every model takes more.
    for length in (32, 16):
        try:
            ids = written(program, count, length, seed)
            break
        except (RuntimeError, IndexError):
            if length == 16:
                raise
    return [decoder_inputs(program, row[None]) for row in ids]


def sample_of_size(program: Program, batch: int, length: int | None) -> list[Tensor]:
    """The inputs of capture cut or repeated to `batch` rows and, where there are lengths of tokens, to `length`; of a causal
    language model with nothing in the cache."""
    if is_causal_lm(program):
        ids = decoder_sample(program, 2, 7, 9)[0]
        return decoder_inputs(program, _cycled(_cycled(ids, 0, batch), 1, length))
    tensors = []
    first = samples(program)[0]
    if is_seq2seq(program):
        first = without_past(program, first)
    for node, tensor in zip(program.placeholders, first, strict=True):
        for dimension, size in enumerate(node.meta["val"].shape):
            is_length = dimension > 0 and has_length(node.meta["val"])
            if not isinstance(size, int) and (dimension == 0 or is_length):
                tensor = _cycled(tensor, dimension, length if is_length else batch)
        tensors.append(tensor)
    return tensors


def has_length(tensor: Tensor) -> bool:
    """Whether the dimensions after the first are lengths: of tokens and masks, and not of images and features."""
    return not tensor.is_floating_point() and any(not isinstance(n, int) for n in tensor.shape[1:])


def _cycled(tensor: Tensor, dimension: int, size: int) -> Tensor:
    return tensor.index_select(dimension, torch.arange(size) % max(tensor.shape[dimension], 1))


def _sample(program: Program, batch_delta: int, delta: int, number: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1234 + 17 * batch_delta + delta + 1009 * number)
    changes = _changes(program, batch_delta, delta)
    tensors = []
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        value = node.meta["val"]
        shape = [s if isinstance(s, int) else max(1, _hint(s) + changes[str(s)]) for s in value.shape]
        if value.dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(value.dtype))
        elif "mask" in declared.name:
            tensors.append(_mask(shape, value.dtype))
        elif value.dtype == torch.bool:
            tensors.append(torch.ones(shape, dtype=torch.bool))
        else:
            tensors.append(torch.randint(0, bound_of(node), shape, generator=generator).to(value.dtype))
    return tensors


def _changes(program: Program, batch_delta: int, delta: int) -> dict[str, int]:
    """Size -> by how much to change it: those that come first are batches, other sizes of integers are tokens, and one of
    floating-point inputs alone stays a multiple of the power of two that it is, as networks that halve an image demand."""
    changes: dict[str, int] = {}
    for value in (node.meta["val"] for node in program.placeholders):
        for dimension, size in enumerate(value.shape):
            if isinstance(size, int):
                continue
            step = 1 if not value.dtype.is_floating_point else min(32, _hint(size) & -_hint(size))
            change = batch_delta if dimension == 0 else delta * step
            before = changes.setdefault(str(size), change)
            changes[str(size)] = min(before, change, key=abs)
    return changes


def _mask(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Ones, the first row padded at its end. Whether True keeps a position or leaves it out differs from model to model, so
    that a boolean mask has both in every row: with one of them alone the model may have nothing to attend to."""
    mask = torch.ones(shape, dtype=dtype)
    if len(shape) > 1 and shape[-1] > 3 and (shape[0] > 1 or dtype == torch.bool):
        (mask if dtype == torch.bool else mask[:1])[..., shape[-1] // 2 + 1 :] = 0
    return mask


def _hint(size: torch.SymInt) -> int:
    return int(size.node.hint)
