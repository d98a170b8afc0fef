"""What a student and its teacher have computed at the ends of blocks, in pairs of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxc.calibrate.blocks import blocks
from fxc.errors import UsageError
from fxc.ir.names import layer_at, weight_of
from fxc.ir.program import Program
from fxc.schemes.scheme import scheme_of

# Of what least squares divide by, so much of its mean is added.
DAMPING = 1e-4


@dataclass(frozen=True)
class End:
    """node: what a block ends with; after: the layer that ran last before it, as users call it."""

    node: fx.Node
    after: str


def ends(program: Program) -> list[End]:
    """Where one value is alive between two blocks, in order (`fxc.calibrate.blocks`)."""
    found = []
    for block in blocks(program, packed=True):
        layers = [node for node in block.nodes if weight_of(program, node) or scheme_of(node.target) is not None]
        if block.leaves is not None:
            found.append(End(block.leaves, layer_at(program, layers[-1])))
    return found


def pairs(student: Program, teacher: Program, in_order: bool = False) -> list[tuple[fx.Node, fx.Node]]:
    """Of each end of the student's blocks the teacher's that it should be like: the one after the layer of the same name. Where
    no names are the same, or in_order, the n-th of N is like the (n M / N)-th of the teacher's M, so that the last are alike.

    Raises UsageError where there are none.
    """
    mine, theirs = ends(student), ends(teacher)
    named = {end.after: end.node for end in theirs}
    found = [] if in_order else [(end.node, named[end.after]) for end in mine if end.after in named]
    if not found and theirs:
        places = [-(-(at + 1) * len(theirs) // len(mine)) - 1 for at in range(len(mine))]
        found = [(end.node, theirs[place].node) for end, place in zip(mine, places, strict=True)]
    if not found:
        raise UsageError(
            "loss=features compares what blocks end with, and this model cannot be cut into blocks", where="loss",
            hint="loss=outputs compares what it gives",
        )  # fmt: skip
    return found


class Projection(nn.Module):
    """A linear map of one dimension of what a student has to the width of the teacher's (Romero et al., arXiv 1412.6550). It
    is trained with the student, and of no use afterwards. dim: the dimension in which the two differ."""

    def __init__(self, dim: int, width: int, wanted: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.zeros(wanted, width))

    @classmethod
    def of_same(cls, x: Tensor) -> Projection:
        """Between values of the shape of x: of its channels where it is [B, C, H, W], else of its last dimension."""
        dim = 1 if x.ndim == 4 else x.ndim - 1
        return cls(dim, x.shape[dim], x.shape[dim])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.movedim(self.dim, -1).float(), self.weight).movedim(-1, self.dim)

    @torch.no_grad()
    def fit(self, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin with the least squares of pairs of what the student and the teacher have."""
        x, y = (torch.cat([each.movedim(self.dim, -1).flatten(0, -2) for each in some]).double() for some in zip(*seen))
        square = x.T @ x
        square.diagonal().add_(DAMPING * square.diagonal().mean().clamp(min=1e-12))
        self.weight.copy_(torch.linalg.solve(square, x.T @ y).T)


def is_alike(seen: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the values of a student are nearer to the teacher's than zeros are."""
    gap, energy = (sum(float(each.float().square().sum()) for each in some) for some in zip(*((a - b, b) for a, b in seen)))
    return gap < energy


def projection(mine: fx.Node, theirs: fx.Node) -> nn.Module:
    """Between the values of these nodes: nothing where they have the same sizes. Raises UsageError where they differ in more
    than one."""
    shapes = [node.meta["val"].shape for node in (mine, theirs)]
    fixed = [(dim, a, b) for dim, (a, b) in enumerate(zip(*shapes)) if isinstance(a, int) and isinstance(b, int) and a != b]
    if len(shapes[0]) != len(shapes[1]) or len(fixed) > 1:
        said = " and ".join(str([n if isinstance(n, int) else "any" for n in shape]) for shape in shapes)
        raise UsageError(f"blocks end with {said}, between which there is no linear map", where="loss=features")
    return Projection(*fixed[0]) if fixed else nn.Identity()
