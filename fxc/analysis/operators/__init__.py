"""The operators that the analyses know: one file for each kind, with all that they know of it."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fxc.analysis.operators import (  # noqa: F401 - each registers its operators
    attention,
    concatenate,
    convolution,
    linear,
    norm,
    permute,
    pointwise,
    reduce,
    resample,
    reshape,
    select,
)
from fxc.analysis.operators.table import OPERATORS, Operator, is_pointwise

_POINTWISE = Operator(axes=pointwise.axes_of_pointwise, known=pointwise.known_of_pointwise)
_RANDOM = Operator(axes=pointwise.axes_of_pointwise)
_NOTHING = Operator()


@cache
def operator_of(target: Any) -> Operator:
    """What is known of an operator. Of those that torch says to be element by element everything is known that is not said
    otherwise."""
    given = OPERATORS.get(target, _NOTHING)
    if not is_pointwise(target):
        return given
    general = _RANDOM if torch.Tag.nondeterministic_seeded in target.tags else _POINTWISE
    if given is _NOTHING:
        return general
    return replace(given, axes=given.axes or general.axes, known=given.known or general.known)
