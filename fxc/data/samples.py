"""Inputs to try a program on, made from nothing but its signature."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxc.ir.program import Program

aten = torch.ops.aten


# More numbers than this are not written into a program's metadata.
_MOST_NUMBERS = 1 << 16


def samples(program: Program) -> list[list[Tensor]]:
    """Sets of input tensors at the sizes of capture and at two others, batch 1 among them; the same for the same program."""
    if program.metadata.get("kind") == "causal_lm":
        return [_with_own_cache(program, *sizes) for sizes in ((2, 7, 9), (1, 1, 6), (3, 5, 0))]
    made = [_sample(program, *variant) for variant in ((0, 0), (1, 3), (-1, 2))]
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


def drawn(program: Program, count: int = 32) -> list[list[Tensor]]:
    """`count` sets of inputs, for what has to be judged on many where no data was given; the same for the same program. For a
    causal language model texts that it writes itself, token by token from one at random, so that they are as likely as it
    thinks; for others random numbers at the sizes of capture."""
    if program.metadata.get("kind") != "causal_lm":
        made = [_sample(program, 0, 0, seed) for seed in range(count)]
        kept = program.metadata.get("examples")
        return [_filled(kept[0], each) for each in made] if kept else made
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
            tensors.append(_integers(node, tuple(shape), generator).to(value.dtype))
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
