"""What a user calls a layer, from the constant that it reads as its weight."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

from fxc.ir.call import Call
from fxc.ir.program import Program

# Format -> its operators, each with its arguments that stand for a weight. The formats are in fxc.schemes, and say so here.
_FORMATS: dict[str, dict[object, tuple[str, ...]]] = {}
_NUMBER = re.compile(r"_\d+\Z")


def register_format(name: str, operators: Iterable[object], parts: tuple[str, ...]) -> None:
    """A format: its name comes between a layer and a part where the layer has something of the part's name already."""
    _FORMATS[name] = dict.fromkeys(operators, parts)


def unregister_format(name: str) -> None:
    del _FORMATS[name]


def layer_name(fqn: str) -> str:
    """mlp.up of mlp.up.weight; the whole name of a bare parameter."""
    return fqn.removesuffix(".weight")


def layer_of(reader: fx.Node, constant: str) -> str:
    """The layer in which the operator `reader` reads this constant as its weight or a part of it: mlp.up of mlp.up.weight, and
    of mlp.up.qweight or mlp.up.int8_2.values where that is what it is to the operator."""
    if constant not in parts_of(reader).values():
        return layer_name(constant)
    layer = constant.rpartition(".")[0]
    return layer.rpartition(".")[0] if is_ambiguous(layer) else layer


def weight_of(program: Program, reader: fx.Node) -> str | None:
    """The first constant of at least two dimensions among the arguments of `reader`."""
    read = (a.target for a in reader.args if isinstance(a, fx.Node) and a.op == "get_attr")
    return next((fqn for fqn in read if fqn in program.constants and program.constants[fqn].ndim >= 2), None)


def layer_read_by(node: fx.Node) -> str:
    """What a user calls a layer, whose second argument is its weight."""
    weight = node.args[1]
    return layer_of(node, weight.target) if weight.op == "get_attr" else node.meta.get("fqn") or str(node)


def layer_at(program: Program, node: fx.Node) -> str:
    """The layer that `node` is: by the weight that it reads, else the module that it came from, else its own name."""
    weight = weight_of(program, node)
    return layer_of(node, weight) if weight else node.meta.get("fqn") or node.name


def parts_of(node: fx.Node) -> dict[str, str]:
    """The constants that stand for the weight of `node`, a call of a format's operator, by what they are to it: qweight, scale,
    ... {} for any other node."""
    parts = next((operators[node.target] for operators in _FORMATS.values() if node.target in operators), ())
    given = {part: Call(node).get(part) for part in parts}
    return {part: a.target for part, a in given.items() if isinstance(a, fx.Node) and a.op == "get_attr"}


def is_ambiguous(layer: str) -> bool:
    """Whether the name of this layer ends like what comes between a layer and a part."""
    before, _, last = layer.rpartition(".")
    return bool(before) and _NUMBER.sub("", last) in _FORMATS
