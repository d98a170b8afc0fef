"""A program in float64 or float32: what rounding does not hide there is what was computed, by a pass or by the model itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fxc.ir.edit import retype
from fxc.ir.infer import fake_mode_of
from fxc.ir.program import Program
from fxc.schemes.scheme import scheme_of

_PROMOTED = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
SINGLE = dict.fromkeys((torch.bfloat16, torch.float16), torch.float32)
LIMIT = 1 << 31  # bytes of a program's wide copy
LITTLE = 1 << 27  # and where memory is short


def in_float64(program: Program, *, typed: bool = False, most: int = LIMIT) -> Program | None:
    """A copy that computes everything in float64, its casts promoted too; None when it would have more than `most` bytes or
    when one of its operators has no such form. typed: infer its types anew, so that passes can run on it."""
    if any((scheme := scheme_of(node.target)) and scheme.is_quantized for node in program.graph.nodes):
        return None
    if 8 * program.numel() > most:
        return None
    promoted = computed_in(program, _PROMOTED)
    if typed:
        with (mode := fake_mode_of(promoted.graph)):
            inputs = [widened(node.meta["val"]) for node in promoted.placeholders]
        retype(promoted, mode, inputs)
    return promoted


def in_float32(program: Program) -> Program | None:
    """A copy that computes in float32 what it does in less, over the same constants where they are of no smaller type; None
    when it would be too large or when weights are quantized."""
    if any((scheme := scheme_of(node.target)) and scheme.is_quantized for node in program.graph.nodes):
        return None
    return computed_in(program, SINGLE) if 4 * program.numel() <= LIMIT else None


def computed_in(program: Program, kinds: dict[torch.dtype, torch.dtype]) -> Program:
    """A copy whose constants and casts of a type in `kinds` have the other one, of packed weights their scales alone; types of
    its values are as they were."""
    promoted = program.copy()
    promoted.constants = {k: t.to(kinds.get(t.dtype, t.dtype)) for k, t in program.constants.items()}
    for node in promoted.graph.nodes:
        node.args = tuple(_promote(a, kinds) for a in node.args)
        node.kwargs = {k: _promote(a, kinds) for k, a in node.kwargs.items()}
    return promoted


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float64 or complex128 if it is of a smaller such type."""
    return tensor.to(_PROMOTED.get(tensor.dtype, tensor.dtype))


def _promote(argument: object, kinds: dict[torch.dtype, torch.dtype]) -> object:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_promote(a, kinds) for a in argument)
    return kinds.get(argument, argument) if isinstance(argument, torch.dtype) else argument
