"""The divergence between two distributions that are given as logits, and its gradient, in the memory of a few rows.

By autograd it takes a dozen passes over float32 logits of all rows, which are a model's largest values. Here a few rows at a
time are gone through while they are in the cache, and what is kept for the way back is the gradient, in the logits' own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers that are gone through at a time: 1 MB of float32.
PART = 1 << 18


def divergence(mine: Tensor, aim: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(aim / temperature) || softmax(mine / temperature)) along the last dimension of logits [..., V], float32 [...].

    Classes that `aim` gives -inf count as nothing. The gradient is that of `mine` alone.
    """
    return _Divergence.apply(mine, aim, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine: Tensor, aim: Tensor, temperature: float) -> Tensor:
        rows, aims = mine.reshape(-1, mine.shape[-1]), aim.reshape(-1, aim.shape[-1])
        made = torch.empty(len(rows), dtype=torch.float32, device=mine.device)
        grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        size = max(PART // mine.shape[-1], 1)
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            ours, theirs = (_logs(each[part], temperature) for each in (rows, aims))
            p = theirs.exp()
            torch.linalg.vecdot(p, theirs.sub_(ours).masked_fill_(p == 0, 0.0), out=made[part])
            if grad is not None:
                grad[part] = ours.exp_().sub_(p).div_(temperature)
        ctx.grad = grad
        return made.view(mine.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, given: Tensor) -> tuple[Tensor, None, None]:
        # Its own, read once: the largest tensor of a step is not written anew.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("the gradient of a divergence is computed once")
        return grad.view(*given.shape, -1).mul_(given[..., None].to(grad.dtype)), None, None


def _logs(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)
