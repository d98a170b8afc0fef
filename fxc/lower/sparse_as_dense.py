"""2:4 sparse layers of quantized numbers run as dense ones where that is the form that a device has."""

from __future__ import annotations

from torch import fx

from fxc.ir import edit
from fxc.ir.names import layer_of
from fxc.ir.program import Program
from fxc.schemes import int4, int4_sparse24, int8, int8_sparse24
from fxc_kernels.sparse24_linear import unpack as unpack_sparse24


def sparse_int8_as_dense(program: Program) -> set[str]:
    """2:4 sparse int8 layers become int8 ones, with their zeros: the product is the same, and fast here. Returns which."""
    made: dict[str, fx.Node] = {}
    layers = set()
    for node in program.graph.find_nodes(op="call_function", target=int8_sparse24.LINEAR):
        x, values, meta, scale, bias = node.args
        layers.add(layer_of(node, values.target))
        if values.target not in made:
            dense = unpack_sparse24(program.constants[values.target], program.constants[meta.target])
            fqn = edit.free_name(program, f"{values.target}_dense")
            made[values.target] = edit.constant(program, fqn, dense, node)
        edit.call(program, int8.LINEAR, (x, made[values.target], scale, bias), replacing=node, by="lower")
    edit.sweep(program)
    return layers


def sparse_int4_as_dense(program: Program) -> set[str]:
    """2:4 sparse int4 layers become int4 ones, with their zeros, which have forms and kernels. Returns which."""
    made: dict[str, fx.Node] = {}
    layers = set()
    for node in program.graph.find_nodes(op="call_function", target=int4_sparse24.LINEAR):
        x, qweight, meta, scale, zero, bias, group = node.args
        layers.add(layer_of(node, qweight.target))
        if qweight.target not in made:
            parts = [None if part is None else program.constants[part.target] for part in (qweight, meta, scale, zero)]
            fqn = edit.free_name(program, f"{qweight.target}_dense")
            made[qweight.target] = edit.constant(program, fqn, int4_sparse24.densified(*parts), node)
        edit.call(program, int4.LINEAR, (x, made[qweight.target], scale, zero, bias, group), replacing=node, by="lower")
    edit.sweep(program)
    return layers
