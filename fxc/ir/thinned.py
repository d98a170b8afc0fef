"""Which packed weights had zeros by choice: what is packed does not say whether a number is zero because it is small."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxc.errors import InputRefused
from fxc.ir.names import layer_name
from fxc.ir.program import Program
from fxc.mapped import Reading, pieces

LEAST = 0.25
"""From this share of zeros on a float weight counts as one that was thinned out."""
_KEY = "thinned"


def remember_thinned(program: Program, packed: Mapping[str, Tensor]) -> None:
    """Write down which of the weights `packed`, by name, as they were before, are thinned out."""
    found = set()
    with Reading(each for each in packed.values() if not each.is_meta) as reading:
        for name, each in packed.items():
            if not each.is_meta and _zeros(each) >= LEAST:
                found.add(layer_name(name))
            reading.done([each])
    if found:
        program.metadata[_KEY] = sorted({*thinned(program), *found})


def _zeros(tensor: Tensor) -> float:
    """The share of zeros."""
    others = sum(int(piece.count_nonzero()) for piece in pieces(tensor))
    return 1 - others / max(tensor.numel(), 1)


def thinned(program: Program) -> frozenset[str]:
    """The layers whose weights were thinned out before they were packed."""
    names = program.metadata.get(_KEY, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputRefused("its list of thinned layers is no list of names", where="program metadata")
    return frozenset(names)
