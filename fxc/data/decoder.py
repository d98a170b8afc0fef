"""Inputs of a decoder, alone or behind an encoder: what it reads, and a cache (see `fxc.ir.cache`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxc.data.tables import bound_of
from fxc.ir.cache import cache_pairs, cache_types, default_positions, empty_cache, is_past, positions_of
from fxc.ir.observe import run
from fxc.ir.program import Program


def decoder_inputs(program: Program, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """For the tokens `ids` [B, N] with nothing before them; mask: [B, N], of ones where it is left out."""
    batch, new = ids.shape
    if mask is None:
        mask = torch.ones(batch, new, dtype=torch.int64)
    return [ids, mask, default_positions(program, mask, new), *empty_cache(program, batch)]


def next_inputs(program: Program, outputs: Sequence[Tensor], ids: Tensor, mask: Tensor, positions: Tensor) -> list[Tensor]:
    """For the tokens `ids` [B, N] after those of a call that returned `outputs`; mask: [B, P + N], positions: [B, N]."""
    return [ids, mask, positions, *(outputs[o] for _, o in cache_pairs(program).values())]


def random_inputs(
    vocabulary: int, cache: Sequence[tuple[int, int, torch.dtype]], batch: int, new: int, past: int
) -> list[Tensor]:
    """For `new` random tokens below `vocabulary` after a random cache of `past`; the same for the same sizes. The first of
    several rows is padded on the left, by a third. cache: heads, width and dtype of each of its tensors."""
    generator = torch.Generator().manual_seed(batch * 10_007 + new * 101 + past)
    ids = torch.randint(0, vocabulary, (batch, new), generator=generator)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    if batch > 1:
        mask[0, : (past + new) // 3] = 0
    filled = [torch.randn(batch, heads, past, width, generator=generator).to(dtype) for heads, width, dtype in cache]
    return [ids, mask, positions_of(mask, new), *filled]


def decoder_sample(program: Program, batch: int, new: int, past: int) -> list[Tensor]:
    """`random_inputs` for a program."""
    cache = [(t.shape[1], t.shape[3], t.dtype) for t in cache_types(program)]
    return random_inputs(bound_of(program.placeholders[0]), cache, batch, new, past)


def decoder_sample_after_itself(program: Program, batch: int, new: int, past: int) -> list[Tensor]:
    """The same after a cache that the program itself has filled: what is always zero there is zero in it."""
    ids, mask, positions, *cache = decoder_sample(program, batch, new, past)
    if past == 0 or program.is_on_meta:
        return [ids, mask, positions, *cache]
    before = decoder_sample(program, batch, past, 0)
    before[1:3] = mask[:, :past], positions_of(mask[:, :past], past)
    return next_inputs(program, run(program, before), ids, mask, positions)


def without_past(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat inputs with a cache of `program` that holds nothing in the place of theirs."""
    kept = [t for t, declared in zip(tensors, program.signature.inputs) if not is_past(declared.name)]
    return [*kept, *empty_cache(program, len(tensors[0]))]


def after_itself(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat inputs of an encoder with a decoder, their cache as the program itself fills it with as many random tokens: what
    is always zero there is zero in it."""
    names = [declared.name for declared in program.signature.inputs]
    pairs = cache_pairs(program)
    length = max((tensors[i].shape[2] for i, _ in pairs.values()), default=0)
    if not length or program.is_on_meta:
        return list(tensors)
    place = names.index("decoder_input_ids")
    before = without_past(program, tensors)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, bound_of(program.placeholders[place]), (len(tensors[place]), length), generator=generator)
    before[place] = ids.to(tensors[place].dtype)
    outputs, made = run(program, before), list(tensors)
    for i, o in pairs.values():
        made[i] = outputs[o]
    return made


def written(program: Program, rows: int, length: int, seed: int = 0) -> Tensor:
    """Texts that the program writes, token by token from one at random: [rows, length] int64."""
    generator = torch.Generator().manual_seed(4321 + seed)
    module, logits = program.module(), program.signature.outputs.index("logits")
    texts = torch.randint(0, bound_of(program.placeholders[0]), (rows, 1), generator=generator)
    inputs = decoder_inputs(program, texts)
    with torch.no_grad():
        while texts.shape[1] < length:
            outputs = module(*inputs)
            likely = outputs[logits][:, -1].float().softmax(-1)
            # Of numbers that are not finite nothing can be drawn, and what they do is found elsewhere.
            new = torch.multinomial(likely.nan_to_num(0.0).clamp(min=1e-30), 1, generator=generator)
            texts = torch.cat([texts, new], 1)
            mask = torch.ones_like(texts)
            inputs = next_inputs(program, outputs, new, mask, positions_of(mask, 1))
    return texts
