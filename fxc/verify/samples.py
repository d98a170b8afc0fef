"""Inputs to try a program on, made from nothing but its signature."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxc.ir.program import Program

aten = torch.ops.aten


def samples(program: Program) -> list[list[Tensor]]:
    """Sets of input tensors at the sizes of capture and at two others, batch 1 among them; the same for the same program."""
    if program.metadata.get("kind") == "causal_lm":
        return [_with_own_cache(program, *sizes) for sizes in ((2, 7, 9), (1, 1, 6), (3, 5, 0))]
    return [_sample(program, *variant) for variant in ((0, 0), (1, 3), (-1, 2))]


def drawn(program: Program, count: int = 32) -> list[list[Tensor]]:
    """`count` sets of inputs, for what has to be judged on many where no data was given; the same for the same program. For a
    causal language model texts that it writes itself, token by token from one at random, so that they are as likely as it
    thinks; for others random numbers at the sizes of capture."""
    if program.metadata.get("kind") != "causal_lm":
        return [_sample(program, 0, 0, seed) for seed in range(count)]
    # The sizes of capture reach 16 positions; not every model takes more.
    for length in (32, 16):
        try:
            ids = _written(program, count, length)
            break
        except (RuntimeError, IndexError):
            if length == 16:
                raise
    return [causal_lm_sample(program, 1, length, 0, row[None]) for row in ids]


def _written(program: Program, rows: int, length: int) -> Tensor:
    """Texts that a causal language model writes: [rows, length] int64."""
    generator = torch.Generator().manual_seed(4321)
    module, names = program.module(), [declared.name for declared in program.signature.inputs]
    outputs = {name: i for i, name in enumerate(program.signature.outputs)}
    inputs = causal_lm_sample(program, rows, 1, 0)
    inputs[0] = _integers(program.placeholders[0], (rows, 1), generator)
    texts = inputs[0]
    with torch.no_grad():
        while texts.shape[1] < length:
            made = module(*inputs)
            likely = made[outputs["logits"]][:, -1].float().softmax(-1)
            # Of numbers that are not finite nothing can be drawn, and what they do is found elsewhere.
            new = torch.multinomial(likely.nan_to_num(0.0).clamp(min=1e-30), 1, generator=generator)
            texts = torch.cat([texts, new], 1)
            past = texts.shape[1] - 1
            given = {"input_ids": new, "attention_mask": torch.ones(rows, past + 1, dtype=torch.int64)}
            given["position_ids"] = torch.full((rows, 1), past)
            given |= {n: made[outputs[n.replace("past.", "present.", 1)]] for n in names if n.startswith("past.")}
            inputs = [given[name] for name in names]
    return texts


def _with_own_cache(program: Program, batch: int, new: int, past: int) -> list[Tensor]:
    """A decoder's inputs after a cache that the program itself has filled: what is always zero there is zero in it."""
    inputs = causal_lm_sample(program, batch, new, past)
    if past == 0 or program.is_on_meta:
        return inputs
    first = causal_lm_sample(program, batch, past, 0)
    for i, declared in enumerate(program.signature.inputs):
        if declared.name == "attention_mask":
            first[i] = inputs[i][:, :past]
        elif declared.name == "position_ids":
            first[i] = (first[1].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        present = dict(zip(program.signature.outputs, program.module()(*first), strict=True))
    names = [declared.name for declared in program.signature.inputs]
    return [present.get(n.replace("past.", "present.", 1), t) for n, t in zip(names, inputs, strict=True)]


def causal_lm_sample(program: Program, batch: int, new: int, past: int, ids: Tensor | None = None) -> list[Tensor]:
    """Inputs of a decoder: `new` tokens (random ones, or `ids`) after a random cache of `past`, one row padded on the left."""
    generator = torch.Generator().manual_seed(batch * 10_007 + new * 101 + past)
    tensors = []
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    if batch > 1:
        mask[0, : (past + new) // 3] = 0
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        value = node.meta["val"]
        if declared.name == "input_ids":
            tensors.append(_integers(node, (batch, new), generator) if ids is None else ids)
        elif declared.name == "attention_mask":
            tensors.append(mask)
        elif declared.name == "position_ids":
            tensors.append((mask.cumsum(-1) - 1).clamp(min=0)[:, past:])
        else:
            shape = (batch, value.shape[1], past, value.shape[3])
            tensors.append(torch.randn(shape, generator=generator).to(value.dtype))
    return tensors


def _sample(program: Program, batch_delta: int, delta: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1234 + 17 * batch_delta + delta + 1009 * seed)
    tensors = []
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        value = node.meta["val"]
        shape = []
        for dimension, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
            elif dimension == 0:
                shape.append(max(1, _hint(size) + batch_delta))
            else:
                shape.append(_hint(size) + (delta if value.dtype == torch.int64 else 0))
        if value.dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(value.dtype))
        elif "mask" in declared.name:
            tensors.append(_mask(shape, value.dtype))
        elif value.dtype == torch.bool:
            tensors.append(torch.ones(shape, dtype=torch.bool))
        else:
            tensors.append(_integers(node, tuple(shape), generator).to(value.dtype))
    return tensors


def _mask(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Ones, the first row padded at its end. Whether True keeps a position or leaves it out differs from model to model, so
    that a boolean mask has both in every row: with one of them alone the model may have nothing to attend to."""
    mask = torch.ones(shape, dtype=dtype)
    if len(shape) > 1 and shape[-1] > 3 and (shape[0] > 1 or dtype == torch.bool):
        (mask if dtype == torch.bool else mask[:1])[..., shape[-1] // 2 + 1 :] = 0
    return mask


def _hint(size: torch.SymInt) -> int:
    return int(size.node.hint)


def _integers(node: fx.Node, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers below the smallest table that they index."""
    bounds = [u.args[0].meta["val"].shape[0] for u in _readers(node) if u.target is aten.embedding.default]
    return torch.randint(0, min(bounds, default=2), shape, generator=generator)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a value, looked for through casts, reshapes and shifts by a constant."""
    found = []
    for user in node.users:
        found.append(user)
        passes_on = user.op == "call_function" and user.target is not aten.embedding.default and user.args[:1] == (node,)
        value = user.meta.get("val")
        if passes_on and isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype:
            found += _readers(user)
    return found
