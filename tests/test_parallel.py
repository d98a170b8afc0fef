"""A program that is divided among processes gives what it gives in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from families import FAMILIES, build
from repo import REPO
from tiny import save
from together import together

import fxc
from fxc.data.samples import samples
from fxc.errors import UsageError
from fxc.ir.cache import is_past, is_present
from fxc.parallel import divide
from fxc.schemes.scheme import scheme_of
from fxc_kernels.collectives import ALL_REDUCE


def program_of(name, passes="", **options):
    model, example = build(name)
    return fxc.optimize(model, example, passes=passes, allow_noop=True, **options).program


def divided(program, count):
    made = [divide(program, number, count) for number in range(count)]
    return [each for each, _ in made], made[0][1]


def largest_error(program, count):
    """Of outputs without a cache, relative to the largest number of each, over the processes and several inputs."""
    parts, division = divided(program, count)
    names = program.signature.outputs
    worst = 0.0
    for inputs in samples(program):
        given = [_own(part, inputs) for part in parts]
        with torch.no_grad():
            expected = program.module()(*(_own(program, inputs)))
        for outputs in together(parts, given):
            for name, ours, theirs in zip(names, outputs, expected, strict=True):
                if not is_present(name) and theirs.is_floating_point():
                    worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst, division


def _own(program, inputs):
    """The inputs with an empty cache of the program's own heads: what is in a cache was computed before."""
    made = []
    length = 0
    for node, declared, tensor in zip(program.placeholders, program.signature.inputs, inputs, strict=True):
        if is_past(declared.name):
            length = tensor.shape[2]
            shape = tensor.shape[0], node.meta["val"].shape[1], 0, tensor.shape[3]
            tensor = torch.empty(shape, dtype=tensor.dtype)
        made.append(tensor)
    return [t[:, length:] if declared.name == "attention_mask" and length else t
            for t, declared in zip(made, program.signature.inputs)]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gpt2", "mixtral", "bert", "vit", "t5", "clip", "mlp"])
def test_two_give_what_one_gives(name):
    error, division = largest_error(program_of(name, "int8", skip="*") if name == "gpt2" else program_of(name), 2)
    assert error < 2e-5 and division.parts


@pytest.mark.parametrize("passes", ["int8:mode=weight_only", "int4:group=32", "int4:group=32:bits=3", "fp8", "sparse24"])
@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_packed_weights_are_cut_with_their_scales(name, passes):
    program = program_of(name, passes, budget=9.0, layer_budget=9.0)
    error, division = largest_error(program, 2)
    assert error < 2e-5 and len(division.parts) == 4 and division.whole == {}
    part = divide(program, 0, 2)[0]
    assert part.nbytes() < 0.85 * program.nbytes()
