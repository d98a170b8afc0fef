"""What a user calls a layer, from the constant that it reads as its weight."""

from __future__ import annotations

import re

from torch import fx

from fxc.ir.call import Call
from fxc.ir.program import Program

# What fxc's operators call the constants that stand for a weight.
_PARTS = ("qweight", "values", "meta", "scale", "zero")
# What comes between a layer and a part where the layer has something of the part's name already.
_BETWEEN = re.compile(r"\.(?:int8|int4|fp8|sparse24)(?:_\d+)?\Z")


def layer_name(fqn: str) -> str:
    """mlp.up of mlp.up.weight; the whole name of a bare parameter."""
    return fqn.removesuffix(".weight")


def layer_of(reader: fx.Node, constant: str) -> str:
    """The layer in which the operator `reader` reads this constant as its weight or a part of it: mlp.up of mlp.up.weight, and
    of mlp.up.qweight or mlp.up.int8_2.values where that is what it is to the operator."""
    if constant not in parts_of(reader).values():
        return layer_name(constant)
    return _BETWEEN.sub("", constant.rpartition(".")[0])


def weight_of(program: Program, reader: fx.Node) -> str | None:
    """The first constant of at least two dimensions among the arguments of `reader`."""
    read = (a.target for a in reader.args if isinstance(a, fx.Node) and a.op == "get_attr")
    return next((fqn for fqn in read if program.constants[fqn].ndim >= 2), None)


def parts_of(node: fx.Node) -> dict[str, str]:
    """The constants that stand for the weight of `node`, a call of one of fxc's operators, by what they are to it: qweight or
    values, meta, scale, zero. {} for any other node."""
    if getattr(node.target, "namespace", "") != "fxc":
        return {}
    given = {part: Call(node).get(part) for part in _PARTS}
    return {part: a.target for part, a in given.items() if isinstance(a, fx.Node) and a.op == "get_attr"}


def is_ambiguous(layer: str) -> bool:
    """Whether the name of this layer ends like what comes between a layer and a part."""
    return _BETWEEN.search(layer) is not None
