"""What a number of a weight is worth by the gradient of the loss: Taylor expansion to first order.

A number w counts by (w dL/dw)^2, averaged over the samples: the squared change of the loss that setting it to zero makes, to
first order (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019). All are in the same unit, and
compare across layers as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from fxc.ir.cache import is_causal_lm
from fxc.ir.next_token import losses_of
from fxc.ir.program import Program


def loss(program: Program, outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int) -> Tensor:
    """That of the next token where the program is a causal language model, and else a fixed random combination of the outputs,
    drawn by `seed`, whose squared gradients are those of the outputs themselves in expectation."""
    names = program.signature.outputs
    if is_causal_lm(program):
        return losses_of(outputs[names.index("logits")], inputs[0], "mean")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            direction = torch.randn(output.shape, generator=generator)
            total = total + (output.float() * direction).sum() / output.numel() ** 0.5
    return total


def scores(
    program: Program, weights: Collection[str], samples: Iterable[Sequence[Tensor]], seed: int = 0
) -> dict[str, Tensor]:
    """float32 in the shape of each of the constants `weights`: (w dL/dw)^2, the mean over the samples; zeros where the loss
    does not depend on it. Holds one gradient and one score for each number of these weights."""
    copy = program.copy()
    leaves = {fqn: program.constants[fqn].detach().requires_grad_() for fqn in weights}
    copy.constants |= leaves
    module = copy.module()
    total = {fqn: torch.zeros(leaf.shape) for fqn, leaf in leaves.items()}
    count = 0
    for inputs in samples:
        with torch.enable_grad():
            found = loss(program, module(*inputs), inputs, seed)
            gradients = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        for (fqn, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is not None:
                total[fqn] += (leaf.detach().float() * gradient.float()).square_()
        count += 1
    return {fqn: each / max(count, 1) for fqn, each in total.items()}
