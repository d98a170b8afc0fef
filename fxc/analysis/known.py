"""Sparse constant propagation: the parts of values that are the same number whatever the program is given.

A zero row of a weight makes its output equal to the bias, at every position and for every input; through an activation f that
is f(bias), through a product with zero it is zero. What is known of a value is kept compactly: a dimension along which it does
not vary, as every dynamic one, has size 1. Products with zero are zero: a program whose values overflow to infinity is outside
of this analysis.

The keys and values that a decoder's cache hands to the next call are what this one returned, so that the past is known where
the present is.
"""

from __future__ import annotations

import torch
from torch import fx

from fxc.analysis.constants import Known, OfConstant, State
from fxc.analysis.operators import operator_of
from fxc.ir.cache import cache_pairs
from fxc.ir.call import Call
from fxc.ir.program import Program


def known_values(program: Program) -> dict[fx.Node, Known]:
    """What is known of each value; a node of whose value nothing is known is left out."""
    inputs, outputs = program.placeholders, program.results
    state = State(program, {inputs[i]: outputs[o] for i, o in cache_pairs(program).values()})
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                tensor = program.constants[node.target]
                if not tensor.is_meta and not tensor.is_complex():
                    state.found[node] = OfConstant(program, node.target)
            elif node.op == "call_function" and (rule := operator_of(node.target).known) is not None:
                result = rule(state, Call(node))
                if isinstance(result, list) or (result is not None and bool(result.mask.any())):
                    state.found[node] = result
    return {node: known for node, known in state.found.items() if isinstance(known, Known)}
