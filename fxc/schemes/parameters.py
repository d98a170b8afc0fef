"""How many numbers a model has: a packed weight counts as the numbers that it stands for, not as the bytes that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxc.ir.names import parts_of
from fxc.ir.program import Program
from fxc.schemes.scheme import Scheme, scheme_of


def parameters(program: Program) -> int:
    """Of all constants, each counted once."""
    return sum(parameters_by_constant(program).values())


def parameters_by_constant(program: Program) -> dict[str, int]:
    """Of each constant by its FQN; of a packed weight at the part that holds them, and its scales not at all."""
    found = {fqn: tensor.numel() for fqn, tensor in program.constants.items()}
    for node in program.graph.nodes:
        scheme = scheme_of(node.target)
        if scheme is not None:
            parts = parts_of(node)
            found |= dict.fromkeys(parts.values(), 0)
            found[parts[scheme.numbers]] = math.prod(shape_of(scheme, {p: program.constants[fqn] for p, fqn in parts.items()}))
    return found


def shape_of(scheme: Scheme, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of the weight that `parts` stand for, whose numbers may be on meta: one row of it is made."""
    numbers = parts[scheme.numbers]
    if numbers.ndim == 4:  # a convolution's, which the formats that take them store one by one
        return tuple(numbers.shape)
    lead = numbers.shape[:-1]
    row = {part: torch.zeros(1, *tensor.shape[len(lead) :], dtype=tensor.dtype) for part, tensor in parts.items()}
    return (*lead, scheme.dense({part: row.get(part) for part in scheme.parts}).numel())
