"""Another program as the teacher: inputs of a student as it takes them, and which of its outputs the student gives too.

Both are matched by the names that a call knows them by. What differs between the two is the cache of a decoder, because layers
and heads are gone or others: the teacher's own is empty, as it is before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxc.errors import UsageError
from fxc.ir.cache import default_positions, is_causal_lm, is_past, is_present
from fxc.ir.program import Program
from fxc.passes.base import Context, Original


@dataclass(frozen=True, kw_only=True)
class Teacher(Original):
    """A program that teaches `student`, which is not made of it. Raises UsageError where it takes what the student is not
    given, where both take or give what has other sizes, another vocabulary above all, and where they give nothing of one
    name."""

    student: Program

    def __post_init__(self) -> None:
        given = _by_name([i.name for i in self.student.signature.inputs], self.student.placeholders)
        for declared, node in zip(self.program.signature.inputs, self.program.placeholders, strict=True):
            name, mine = declared.name, given.get(declared.name)
            if is_past(name) or (mine is None and (declared.default or self._is_of_decoder(name))):
                continue
            if mine is None:
                takes = ", ".join(each for each in given if not is_past(each))
                raise UsageError(f"the teacher takes {name}, and the student does not: it takes {takes}", where="teacher")
            if _differ(mine, node.meta["val"]):
                sizes = f"{_sizes(node.meta['val'])} and the student {_sizes(mine)}"
                raise UsageError(f"the teacher takes {name} as {sizes}", where="teacher", hint="both see the same samples")
        self._check_outputs()

    def _is_of_decoder(self, name: str) -> bool:
        return is_causal_lm(self.program) and name in ("attention_mask", "position_ids")

    def _check_outputs(self) -> None:
        mine, its = (_by_name(p.signature.outputs, p.results) for p in (self.student, self.program))
        if "logits" in mine and "logits" in its and _differ(mine["logits"], its["logits"]):
            count, other = its["logits"].shape[-1], mine["logits"].shape[-1]
            raise UsageError(
                f"the teacher tells {count:,} tokens or labels apart, and the student {other:,}", where="teacher",
                hint="a student needs the vocabulary of its teacher, or its labels: set vocab_size or num_labels in its config",
            )  # fmt: skip
        if not [name for name in mine.keys() & its.keys() if not is_present(name)]:
            gives = [", ".join(n for n in each if not is_present(n)) for each in (its, mine)]
            raise UsageError(
                f"the teacher gives {gives[0]} and the student {gives[1]}: there is nothing to compare", where="teacher",
                hint="give the two the same head",
            )  # fmt: skip

    @cached_property
    def alike(self) -> frozenset[str]:
        """Of the outputs those that both give, in the same sizes and as floats; the cache is none of them."""
        mine, its = (_by_name(p.signature.outputs, p.results) for p in (self.student, self.program))
        names = [name for name in mine.keys() & its.keys() if not is_present(name)]
        return frozenset(n for n in names if mine[n].is_floating_point() and not _differ(mine[n], its[n]))

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the student as the teacher takes them. Raises UsageError for a cache that is not empty."""
        given = dict(zip((i.name for i in self.student.signature.inputs), tensors, strict=True))
        if any(is_past(name) and each.shape[2] for name, each in given.items()):
            hint = "give texts from their first token on"
            raise UsageError("a sample has a cache, which the teacher has not filled", where="teacher", hint=hint)
        made: dict[str, Tensor] = {}
        for declared, node in zip(self.program.signature.inputs, self.program.placeholders, strict=True):
            made[declared.name] = self._input(declared.name, declared.default, node.meta["val"], given, made)
        return list(made.values())

    def _input(
        self, name: str, default: str | None, like: Tensor, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> Tensor:
        if is_past(name):
            ids = given["input_ids"]
            return torch.empty(len(ids), like.shape[1], 0, like.shape[3], dtype=like.dtype, device=ids.device)
        if name in given:
            return given[name].to(like.dtype) if like.is_floating_point() else given[name]
        if default:
            kind, _, other = default.partition(":")
            make = torch.ones_like if kind == "ones" else torch.zeros_like
            return make(given[other] if other in given else made[other], dtype=like.dtype)
        if name == "attention_mask":
            return torch.ones_like(given["input_ids"])
        ids = given["input_ids"]
        return default_positions(self.program, given.get("attention_mask", torch.ones_like(ids)), ids.shape[1])

    def outputs(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """What the teacher gave of what the student gives, None where the two are not to be compared."""
        gave = dict(zip(self.program.signature.outputs, tensors, strict=True))
        return [gave[name] if name in self.alike else None for name in self.student.signature.outputs]


def teacher_of(context: Context, program: Program) -> Original:
    """Who teaches `program`: the teacher that was given, else what it was before the first pass."""
    if context.teacher is not None:
        return Teacher(context.teacher, student=program, is_other=context.is_other)
    return context.original or Original(program.copy())


def _by_name(names: Sequence[str], nodes: Sequence[torch.fx.Node]) -> dict[str, Tensor]:
    return {name: node.meta["val"] for name, node in zip(names, nodes, strict=True)}


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether there is no call for which two values have the same sizes."""
    if one.ndim != other.ndim:
        return True
    pairs = zip(one.shape, other.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _sizes(value: Tensor) -> str:
    return "[" + ", ".join(str(size) if isinstance(size, int) else "*" for size in value.shape) + "]"
