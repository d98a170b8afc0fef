"""What changes while training goes on, besides the rate: how much is zero, and from when on numbers are rounded."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxc.calibrate.masks import keep_share
from fxc.errors import UsageError
from fxc.ir.program import users_of
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR
from fxc.train.latent import Float
from fxc.train.trainable import BATCH_NORM, Trainable

aten = torch.ops.aten
PRODUCTS = {
    LINEAR, GROUPED_LINEAR, aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.convolution.default,
}  # fmt: skip
# The share of the training in which zeros come; in the rest what is left settles.
RAMP = 0.7
# So many times masks are drawn anew in it.
ROUNDS = 50


class Sparser:
    """Gradual magnitude pruning: after a share t of the ramp, s (1 - (1 - t)^3) of the numbers of each layer's weight are zero,
    those of smallest magnitude (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878). What is zero once stays so."""

    def __init__(self, student: Trainable, sparsity: float, ramp: float = RAMP) -> None:
        self.sparsity, self.ramp = sparsity, ramp
        self.latents = list(weights(student).values())
        if not self.latents:
            what = "there is no float weight of a linear layer or convolution in it to prune"
            raise UsageError(what, where="recover:sparsity", hint="prune before quantizing: recover:sparsity=0.8,int8")
        self._drawn = -1

    def __call__(self, done: float) -> None:
        at = min(done / self.ramp, 1.0)
        drawn = int(at * ROUNDS)
        if drawn == self._drawn:
            return
        self._drawn = drawn
        share = self.sparsity * (1 - (1 - drawn / ROUNDS) ** 3)
        for latent in self.latents:
            with torch.no_grad():
                latent.keep = keep_share(latent().abs(), share, by_row=False)


def weights(student: Trainable) -> dict[str, Float]:
    """The latents of float weights that linear layers and convolutions read, and nothing else does, by name."""
    program = student.program
    return {
        name: latent
        for name, latent in student.latents.items()
        if isinstance(latent, Float) and latent.weight.ndim > 1
        if all(user.target in PRODUCTS for user in users_of(program, name))
    }


def norm_scales(student: Trainable) -> list[nn.Parameter]:
    """The scales of batch norms, for an L1 penalty on them (Network Slimming, Liu et al., arXiv 1708.06519): those that fall to
    about zero are of channels that can go. Raises UsageError where there are none."""
    norms = student.program.graph.find_nodes(op="call_function", target=BATCH_NORM)
    names = [node.args[1].target for node in norms if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"]
    if not names:
        what = "there is no batch norm in it, whose scales could become small"
        raise UsageError(what, where="recover:l1", hint="leave l1 out")
    return [student.latents[name].weight for name in dict.fromkeys(names)]


def l1(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([each.abs().sum() for each in parameters]).sum()


