"""Operators that run and are not trained through: a gradient that is asked through one is an error, when it is asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A decorator: the function becomes the functional operator `name`, as in "fxc::fp8_linear", without a gradient."""

    def define(function: Callable[..., Any]) -> CustomOpDef:
        defined = torch.library.custom_op(name, function, mutates_args=())
        refuse_gradient(name)
        return defined

    return define


def refuse_gradient(name: str) -> None:
    """Let the operator `name` run on tensors that require gradients, and raise RuntimeError in the backward pass.

    Without this an operator of `torch.library.define` gives the gradients of whatever torch operators it is made of, which
    are those of a rounding: zero, or by accident something else. torch.compile traces the backward pass with the forward one,
    and raises then.
    """

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no gradient: what fxc compiles is not trained; train the original model and compile it again, "
            "or call this one under torch.no_grad()"
        )

    torch.library.register_autograd(name, backward)
