"""What a student computes, as a program in operators with gradients: so it is cut into blocks, and gone through by them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fxc.ir.program import Program
from fxc.train.latent import Latent
from fxc.train.trainable import Trainable

_CAST = torch.ops.aten.to.dtype


class Plain:
    """program: what `student` computes now; its constants are the student's weights as floats, by the names of
    `student.latents`, and whatever else it reads. gives: of each of these weights, what computes it with a gradient."""

    def __init__(self, student: Trainable) -> None:
        self.student = student
        fixed = list(student.program.constants)
        graph, made, constants = fx.Graph(), {}, {}
        self.gives: dict[str, Callable[[], Tensor]] = {}
        for node in student.module.graph.nodes:
            if (name := student.latent_at(node)) is not None:
                made[node] = graph.get_attr(name)
                self.gives[name] = _in_dtype(student.latents[name], _read_in(node))
            elif node.target is _CAST and student.latent_at(node.args[0]) is not None and _read_in(node.args[0]) is not None:
                made[node] = made[node.args[0]]
            elif node.op == "call_module":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
                function = _function(student.module.get_submodule(node.target))
                made[node] = graph.create_node("call_function", function, args, kwargs, name=node.target)
                made[node].meta["val"] = args[0].meta["val"]
            else:
                made[node] = graph.node_copy(node, made.__getitem__)
                if node.op == "get_attr":
                    made[node].target = fixed[int(node.target.removeprefix("constant_"))]
                    constants[made[node].target] = student.program.constants[made[node].target]
        self.program = Program(graph, constants, {}, copy.deepcopy(student.program.signature))
        self.update(list(self.gives))

    @torch.no_grad()
    def update(self, names: list[str]) -> None:
        """Have the constants of these names be what they are now."""
        self.program.constants |= {name: self.gives[name]() for name in names}


def _function(module: nn.Module) -> Callable[..., Tensor]:
    def called(*args: object, **kwargs: object) -> Tensor:
        return module(*args, **kwargs)

    return called


def _read_in(weight: fx.Node) -> torch.dtype | None:
    """The dtype to which every reader of a weight casts it."""
    casts = {user.args[1] if user.target is _CAST else None for user in weight.users}
    return casts.pop() if len(casts) == 1 else None


def _in_dtype(latent: Latent, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    return latent if dtype is None else lambda: latent().to(dtype)
