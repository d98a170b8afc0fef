"""The facts that passes need, give and break. Each can be checked, and is, after every pass that claims it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch._ops import OpOverload

from fxc.ir.names import layer_of, parts_of
from fxc.ir.program import Program, users_of
from fxc.passes.base import Fact
from fxc.schemes.scheme import Scheme, scheme_of

aten = torch.ops.aten
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
SECOND_OPERAND = {aten.mm.default: 1, aten.matmul.default: 1, aten.addmm.default: 2}
"""The operators that multiply by a matrix, and which of their arguments it is."""


def factor(program: Program, node: fx.Node) -> fx.Node | None:
    """The matrix of the product `node`, where it can be the weight of a linear: a constant transposed in the graph, or one
    that may be stored transposed, because all that is done with it is to multiply by it. None for every other node."""
    matrix = node.args[SECOND_OPERAND[node.target]] if node.target in SECOND_OPERAND else None
    if not isinstance(matrix, fx.Node):
        return None
    if is_transposed_matrix(program, matrix):
        return matrix
    if not _is_matrix(program, matrix):
        return None
    return matrix if all(_multiplies_by(user, matrix.target) for user in users_of(program, matrix.target)) else None


def is_transposed_matrix(program: Program, node: fx.Node) -> bool:
    """Whether `node` is the transpose of a constant matrix."""
    if node.target not in TRANSPOSES or not _is_matrix(program, node.args[0]):
        return False
    # Of a matrix, what swaps two different dimensions or reverses their order is the transpose.
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]
    return node.target is not aten.transpose.int or (node.args[1] - node.args[2]) % 2 == 1


def _is_matrix(program: Program, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    tensor = program.constants[node.target]
    return tensor.ndim == 2 and tensor.dtype.is_floating_point


def _multiplies_by(user: fx.Node, fqn: str) -> bool:
    """Whether `user` is a product whose second operand, and nothing else, is the constant `fqn`."""
    reads = [i for i, a in enumerate(user.args) if isinstance(a, fx.Node) and a.op == "get_attr" and a.target == fqn]
    return user.target in SECOND_OPERAND and reads == [SECOND_OPERAND[user.target]]


def _not_canonical(program: Program) -> dict[str, str]:
    found = {}
    for node in program.graph.nodes:
        if (matrix := factor(program, node)) is not None:
            fqn = matrix.target if matrix.op == "get_attr" else matrix.args[0].target
            found[node.name] = f"{node} multiplies by the constant {fqn} and is not a linear"
    return found


def arguments(node: fx.Node) -> dict[str, object]:
    """The arguments of a call by the names that its operator's schema gives them; {} where it has no schema."""
    if not isinstance(node.target, OpOverload):
        return {}
    return dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs


def packed_weight(node: fx.Node) -> str | None:
    """The FQN of the packed weight that `node` multiplies by, if it is one of a format's operators."""
    scheme = scheme_of(node.target)
    return scheme and parts_of(node).get(scheme.numbers)


def _of_layers(name: str, is_so: Callable[[Scheme], bool], said: str) -> Fact:
    """No layer's weight is packed in a format that is so; said: what such a weight is."""

    def broken(program: Program) -> dict[str, str]:
        packed = {node: packed_weight(node) for node in program.graph.nodes if (s := scheme_of(node.target)) and is_so(s)}
        return {layer_of(node, fqn): f"{fqn} is a {said} weight" for node, fqn in packed.items() if fqn}

    return Fact(name, broken, by_layer=True)


CANONICAL = Fact("canonical", _not_canonical)
"""A product with a constant matrix, other uses of which do not stand in the way (`factor`), is an `aten.linear`."""

FLOAT_WEIGHTS = _of_layers("float_weights", lambda scheme: scheme.is_quantized, "quantized")
"""The numbers of every weight are still the model's floating-point ones, so that it can be pruned or quantized."""

DENSE_WEIGHTS = _of_layers("dense_weights", lambda scheme: scheme.is_sparse, "2:4 sparse")
"""No weight is packed as 2:4, which leaves numbers out: every weight that is not quantized has its own shape."""


def _scaled(program: Program) -> dict[str, str]:
    return {"": "scales were moved between its layers"} if program.metadata.get("scaled") else {}


UNSCALED = Fact("unscaled", _scaled)
"""No pass has moved scales between layers: how large a weight is says what it said in the model."""


def _not_smooth(program: Program) -> dict[str, str]:
    return {} if program.metadata.get("smooth") else {"": "large channels of what its layers read were not looked for"}


SMOOTH = Fact("smooth", _not_smooth)
"""Where scales can be moved out of what linear layers read, no channel is much larger than the others."""


def _halved(program: Program) -> dict[str, str]:
    half = program.metadata.get("half")
    return {"": f"the pass {half} has rounded its weights"} if half else {}


FULL_PRECISION = Fact("full_precision", _halved)
"""No pass has rounded weights to bf16 or fp16: they have the precision that the model came with."""
