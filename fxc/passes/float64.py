"""A program in float64: what rounding does not hide there is what was computed, by a pass or by the model itself."""

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
_FLOAT64_LIMIT = 1 << 31  # bytes of a program's float64 copy


def in_float64(program: Program, *, typed: bool = False) -> Program | None:
    """A copy that computes everything in float64, its casts promoted too; None when it would be too large or when one of
    its operators has no such form. typed: infer its types anew, so that passes can run on it."""
    if any((scheme := scheme_of(node.target)) and scheme.is_quantized for node in program.graph.nodes):
        return None
    if 8 * program.numel() > _FLOAT64_LIMIT:
        return None
    promoted = program.copy()
    promoted.constants = {k: widened(t) for k, t in program.constants.items()}
    for node in promoted.graph.nodes:
        node.args = tuple(_promote(a) for a in node.args)
        node.kwargs = {k: _promote(a) for k, a in node.kwargs.items()}
    if typed:
        with (mode := fake_mode_of(promoted.graph)):
            inputs = [widened(node.meta["val"]) for node in promoted.placeholders]
        retype(promoted, mode, inputs)
    return promoted


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float64 or complex128 if it is of a smaller such type."""
    return tensor.to(_PROMOTED.get(tensor.dtype, tensor.dtype))


def _promote(argument: object) -> object:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_promote(a) for a in argument)
    return _PROMOTED.get(argument, argument) if isinstance(argument, torch.dtype) else argument
