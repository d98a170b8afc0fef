"""The sweep that GPTQ and SparseGPT share: settle one column of a weight, let the columns after it make up for the error.

Optimal Brain Surgeon (Hassibi and Stork, 1993), all rows in one order as in GPTQ (Frantar et al., arXiv 2210.17323): with
U^T U = inverse of H, U upper triangular, a column j that changes by e is made up for by  w[j+1:] -= e / U[j, j] * U[j, j+1:],
and what cannot be made up for adds (e / U[j, j])^2 / 2 to the layer's squared error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxc.errors import InputRefused

BLOCK = 128
Settle = Callable[[int, Tensor], Tensor]


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diagonal) * I: columns that no input reaches have something to divide by, and change no other."""
    mean = hessian.diagonal().mean()
    return hessian + torch.diag(torch.full_like(hessian.diagonal(), damp) * torch.where(mean > 0, mean, 1.0))


def cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Lower L with L L^T = H + damp * mean(diagonal) * I, damp grown tenfold until that is positive definite.

    Raises InputRefused for a negative damp, and when not even a damp of 1 helps: then H is no Hessian.
    """
    if damp < 0:
        raise InputRefused(f"damp={damp} is below zero")
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damp))
        if not failed and lower.isfinite().all():
            return lower
        if damp >= 1:
            raise InputRefused("these statistics are of no layer's input", why="they are not positive semidefinite")
        damp = max(10 * damp, 1e-6)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper U [K, K] float32 with U^T U = inverse of the damped H, computed in H's dtype without inverting it.

    With the columns in reverse order H = L L^T; turned back this is H = R R^T, R upper triangular, and U = R^-1.
    """
    upper = cholesky(hessian.flip(0, 1), damp).flip(0, 1)
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True).float()


def falling(hessian: Tensor) -> Tensor:
    """int64 [K]: columns by falling H[k, k], equal ones in order: what is settled first has most columns to make up for it."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def sweep(weight: Tensor, upper: Tensor, settle: Settle, block: int = BLOCK) -> Tensor:
    """Visit the columns of `weight` float32 [N, K] from the first to the last; what was settled, [N, K].

    settle(j, ahead): the values [N] that column j shall have. ahead [columns, N], to read only: what columns j and after it
    are by now, to the end of j's block of `block`; blocks begin at multiples of it.
    """
    work = weight.t().contiguous()
    columns, rows = work.shape
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = work.new_empty(end - begin, rows)
        for j in range(begin, end):
            ahead = work[j:end]
            made = settle(j, ahead)
            error = (ahead[0] - made) / upper[j, j]
            ahead.addr_(upper[j, j:end], error, alpha=-1)
            ahead[0] = made
            errors[j - begin] = error
        work[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    return work.t().contiguous()
