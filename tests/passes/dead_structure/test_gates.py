"""What is removed wrongly, or left behind, does not get through the gates."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from removal import Attention, canonical
from zeroed import TOKENS, family, mlp, zero_heads

from fxc.analysis.groups import groups
from fxc.errors import VerificationFailed
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context, Result
from fxc.passes.dead_structure import dead_structure
from fxc.passes.dead_structure.dead_structure import DeadStructure
from fxc.passes.prune.mask import mask
from fxc.pipeline import run_passes


def other_units(axes, alive, folds):
    return SHRINK(axes, {atom: its.roll(1) for atom, its in alive.items()}, folds)


def no_folds(axes, alive, folds):
    return SHRINK(axes, alive, {})


def folds_of_the_wrong_sign(axes, alive, folds):
    return SHRINK(axes, alive, {node: -values for node, values in folds.items()})


def copies_of_the_wrong_head(axes, alive, folds):
    for link in axes.links:
        link.index.copy_(link.index.flip(0))
    return SHRINK(axes, alive, folds)


def another_cut_of_the_cache(axes, alive, folds):
    inputs = SHRINK(axes, alive, folds)
    return {name: {dim: torch.arange(len(i)) for dim, i in dims.items()} for name, dims in inputs.items()}


SHRINK = dead_structure.shrink


class Broken(DeadStructure):
    """`DeadStructure` that shrinks in a wrong way."""

    name = ""  # not registered
    how = None

    def run(self, program, context):
        with mock.patch.object(dead_structure, "shrink", type(self).how):
            return super().run(program, context)


class Idle(DeadStructure):
    """`DeadStructure` that removes nothing."""

    name = ""

    def run(self, program, context):
        return Result()


def broken(how):
    return type("Broken", (Broken,), {"how": staticmethod(how)})()


def masked_mlp() -> Program:
    program = canonical(mlp(), (torch.randn(3, 6).double(),))
    mask(program, next(g for g in groups(program) if g.kind == "ffn"), torch.tensor([2, 3, 9]))
    return program


def constant_mlp() -> Program:
    model = mlp()
    with torch.no_grad():
        model.up.weight[[2, 3, 9]] = 0
        model.up.bias[[2, 3, 9]] = 1
    return canonical(model, (torch.randn(3, 6).double(),))


def uneven_attention() -> Program:
    model = Attention(6, 2)
    zero_heads(model, "o columns", 1, 2)
    return canonical(model, (torch.randn(TOKENS).double(),))


def decoder_without_a_head() -> Program:
    program = family("gpt2")[1].copy()
    mask(program, next(g for g in groups(program) if g.kind == "head"), torch.tensor([1]))
    return program


@pytest.mark.parametrize(
    ("program", "how"),
    [
        (masked_mlp, other_units),
        (constant_mlp, no_folds),
        (constant_mlp, folds_of_the_wrong_sign),
        (uneven_attention, copies_of_the_wrong_head),
        (decoder_without_a_head, another_cut_of_the_cache),
    ],
    ids=lambda each: each.__name__,
)
def test_what_is_removed_wrongly_does_not_get_through_the_gates(program, how):
    program = program()
    step = broken(how)
    with pytest.raises(VerificationFailed, match="may not change what the program computes"):
        run_passes(program, Context(), Options([step]))
    run_passes(program, Context(), Options([DeadStructure()]))


def test_what_is_left_behind_does_not_get_through_the_gates():
    with pytest.raises(VerificationFailed, match=r"promises no_dead_structure, and .* has a dead ffn"):
        run_passes(masked_mlp(), Context(), Options([Idle()]))
