"""What the analyses know of each operator: one record, registered by the file of the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.analysis.axis import Axis
from fxc.analysis.constants import Known, State
from fxc.analysis.dims import Axes, Link, Site
from fxc.ir.call import Call

MaskOf = Callable[[Axis], Tensor | None]
"""An axis -> [size] bool, the indices that stay; None where all do."""


@dataclass(frozen=True)
class Dead:
    """At a site: positions, [size of its axis] bool, where the contribution is known without running the program. fold: what
    stands there, float64, where it is another number than zero and goes into the consumer's bias. kept: why what is constant
    stays nevertheless."""

    positions: Tensor
    fold: Tensor | None = None
    kept: str | None = None


@dataclass(frozen=True)
class Relink:
    """What stays of a link's copies: stays, bool, which of them; index: of which index of what stays of the source each is.
    each: how many copies one has, where is_even says that all have as many, one after another. alive: which indices of atoms
    stay."""

    link: Link
    stays: Tensor
    index: Tensor
    each: int
    is_even: bool
    alive: dict[Any, Tensor]


@dataclass(frozen=True)
class Operator:
    """The rules of one operator, all of which may be absent.

    axes: from the axes of what it takes to those of what it gives, with the sites and links that it makes. Without, everything
    that it touches is pinned: a new operator costs possibilities and never correctness.
    known: which parts of its result are the same number whatever the program is given. Without, none.
    dead: at its site, which positions do not matter. Without, none.
    fold: (weight, values that go) -> what they contribute to each output, in float64.
    resize: derive the sizes among its arguments anew; whether one changed.
    relink: of one that makes links, let the copies that stay read what stays; the node whose type changes, if one does.
    """

    axes: Callable[[Axes, Call], Any] | None = None
    known: Callable[[State, Call], Any] | None = None
    dead: Callable[[Site, Call, Mapping[fx.Node, Known]], Dead] | None = None
    fold: Callable[[Tensor, Tensor], Tensor] | None = None
    resize: Callable[[Axes, Call, MaskOf], bool] | None = None
    relink: Callable[[Axes, Call, Relink], fx.Node | None] | None = None


OPERATORS: dict[Any, Operator] = {}


def register(*targets: Any, **rules: Any) -> None:
    """Say what is known of `targets`, once for each."""
    operator = Operator(**rules)
    for target in targets:
        if target in OPERATORS:
            raise ValueError(f"{target} is registered twice")
        OPERATORS[target] = operator


def is_pointwise(target: Any) -> bool:
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1
