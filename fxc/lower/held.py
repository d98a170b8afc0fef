"""What a lowered program keeps in memory, by form."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from fxc.ir.cache import is_past
from fxc.ir.program import Program
from fxc.schemes.scheme import EMBEDDING, product_of, scheme_of
from fxc_kernels.cpu.ops import NATIVE_INT4_LINEAR, ROWS

COPIES, VECTORS = "float copies", "scales, norms and biases"
_PACKED = {torch.int8: "int8 packed", torch.uint8: "int4 packed", torch.float8_e4m3fn: "fp8 packed"}


def held(program: Program) -> dict[str, int]:
    """Form -> bytes of the constants that are in it, the largest first: "int8 packed", "int4 packed", "float weights", those
    beside packed ones ("float copies"), tables of embeddings by their format, and the vectors between. One that is read in two
    forms, as a table that is tied to a head, counts once."""
    forms: dict[str, str] = {}
    for node in program.graph.nodes:
        for name, constant in _read(node):
            forms.setdefault(constant.target, _form(node, name, program.constants[constant.target]))
    total: Counter[str] = Counter()
    for fqn, form in forms.items():
        value = program.constants[fqn]
        total[form] += value.numel() * value.element_size()
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def cache_bytes(program: Program) -> int:
    """What a decoder's cache takes for each token of a sequence; 0 for a program that has none."""
    inputs = zip(program.signature.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
    pasts = [node.meta["val"] for given, node in inputs if is_past(given.name)]
    return sum(past.shape[1] * past.shape[3] * past.element_size() for past in pasts)


def _read(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """(the argument's name, the constant) for each that a call reads."""
    if node.op != "call_function":
        return []
    names = [each.name for each in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
    found = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    named = [(name, each) for name, each in found if isinstance(each, fx.Node) and each.op == "get_attr"]
    rest = {each for each in node.all_input_nodes if each.op == "get_attr"} - {each for _, each in named}
    if node.target is ROWS:  # of lists only the constants' own names say what they are
        return [(each.target.rpartition(".")[2], each) for each in rest]
    return [*named, *(("", each) for each in rest)]


def _form(node: fx.Node, name: str, value: Tensor) -> str:
    if name == "dense":
        return COPIES
    product = product_of(node.target)
    if value.dim() < 2 or name in ("scale", "zero", "zero_point", "zero_point_term"):
        return VECTORS
    if node.target is EMBEDDING or (product and product.layer is EMBEDDING):
        return f"{scheme_of(node.target).label if product else 'float'} tables"
    if product:  # no form of this device: it runs as it is stored
        return f"{scheme_of(node.target).label} packed"
    if node.target is NATIVE_INT4_LINEAR or value.dtype in _PACKED:
        return _PACKED[value.dtype]
    return "float weights" if value.is_floating_point() else "other"
