"""The linear layers that a half-block ends with, solved for instead of trained: least squares over what they are given.

What an attention or a feed-forward part adds to the residual stream is linear in the weight of its last layer. So the weight
with which it comes nearest to what the teacher's part left in the stream is found at once, as in OBC (Frantar and Alistarh,
arXiv 2208.11580) and ZipLM (arXiv 2302.04089), but with the stream as aim: it makes up for what went wrong before, too. In a
network with norms after its blocks, what goes into the norm is the aim.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxc.calibrate.columns import cholesky, damped
from fxc.calibrate.refit import change_of
from fxc.calibrate.stream import State, reader
from fxc.train.latent import Float, Latent, Thin
from fxc.train.plain import Plain

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
CASTS = (aten.to.dtype,)
# Of the mean diagonal of what a layer is given: holds back what few samples say.
DAMP = 1e-3


@dataclass(frozen=True)
class Ends:
    """sum, aim: the nodes of the student and of the teacher that are to be equal; linears: of the student, that add to it."""

    sum: fx.Node
    aim: fx.Node
    linears: list[fx.Node]


def ends_of(gives: fx.Node, aims: fx.Node, inside: Collection[fx.Node], weights: Collection[str]) -> Ends | None:
    """Where the value `gives` of the student, and `aims` of its teacher, are sums of linear layers and other things, or norms
    of such sums; None where they are not. inside: the student's nodes that count; weights: the constants that may change."""
    while gives.target is aims.target and gives.target in NORMS:
        gives, aims = gives.args[0], aims.args[0]
    found, seen = [], [gives]
    while seen:
        node = seen.pop()
        if node not in inside:
            continue
        if (node.target is aten.add.Tensor and not node.kwargs) or node.target in CASTS:
            seen += [each for each in node.args if isinstance(each, fx.Node)]
        elif node.target is aten.linear.default and node.args[1].op == "get_attr" and node.args[1].target in weights:
            found.append(node)
    # One that is added twice, or reads the weight of another, is not solved for alone.
    alone = [node for node in found if sum(n is node or n.args[1].target == node.args[1].target for n in found) == 1]
    return Ends(gives, aims, alone) if alone else None


@torch.no_grad()
def solve(ends: Ends, plain: Plain, states: Sequence[State], aims: Sequence[Tensor]) -> None:
    """Solve for the weights of `ends.linears` of a student, in place, one after another. states: what the segment is given, of
    each sample; aims: what the sum is to be. What cannot be solved for stays: weights in levels, and what is not trained."""
    read = reader(plain.program, [ends.sum, *(node.args[0] for node in ends.linears)], states[0])
    names = [node.args[1].target for node in ends.linears]
    for node, name in zip(ends.linears, names, strict=True):
        latent = plain.student.latents[name]
        parameter = _numbers(latent)
        if parameter is None or not parameter.requires_grad:
            continue
        weight, now = latent(), {each: plain.gives[each]() for each in names}
        curvature, slope = torch.zeros(weight.shape[1], weight.shape[1]), torch.zeros(weight.shape)
        for state, aim in zip(states, aims, strict=True):
            values = read(state, now)
            x, gap = (each.flatten(0, -2) for each in (values[node.args[0]].float(), aim.float() - values[ends.sum].float()))
            curvature += x.mT @ x
            slope += gap.mT @ x
        change = _solved(weight, curvature, slope)
        with torch.enable_grad():
            # A latent gives its numbers at their places: the gradient of a product with it takes them from there.
            (step,) = torch.autograd.grad((latent() * change).sum(), parameter)
        parameter += step


def _numbers(latent: Latent) -> nn.Parameter | None:
    """The numbers that a latent's weight consists of, each at its place, where it is nothing else."""
    if isinstance(latent, Thin):
        latent = latent.numbers
    return latent.weight if isinstance(latent, Float) and latent.dtype != torch.float64 else None


def _solved(weight: Tensor, curvature: Tensor, slope: Tensor) -> Tensor:
    """What is to be added to a weight, nothing where it is zero."""
    keep = weight != 0
    if bool(keep.all()):
        lower = cholesky(curvature.double(), DAMP)
        return torch.cholesky_solve(slope.double().mT, lower).mT.float()
    return change_of(keep, slope, damped(curvature, DAMP))
