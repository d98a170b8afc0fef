"""The weight of a latent computed from other parameters while it trains, and as a parameter of its own again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from fxc.train.latent import Cast, Float, Latent, Rounded, Thin


def holder_of(latent: Latent) -> tuple[Float | Rounded, str]:
    """The module that has the weight, and what stands before it in the names of parameters."""
    if isinstance(latent, Thin):
        return latent.numbers, "numbers."
    return (latent.master, "master.") if isinstance(latent, Cast) else (latent, "")


def kind_of(latent: Latent) -> str:
    """Of the weight, as `Latent.kind` has it."""
    return latent.kind[f"{holder_of(latent)[1]}weight"]


def reparametrize(latent: Latent, by: nn.Module, kinds: Mapping[str, str], *, unsafe: bool = False) -> None:
    """Let `by` give the weight of its `original` and what else it has; kinds: of these. unsafe: original has another shape than
    the weight (`torch.nn.utils.parametrize`)."""
    holder, prefix = holder_of(latent)
    parametrize.register_parametrization(holder, "weight", by, unsafe=unsafe)
    inner = {f"{prefix}parametrizations.weight.{own}": kind for own, kind in kinds.items()}
    latent.kind = {own: kind for own, kind in latent.kind.items() if own != f"{prefix}weight"} | inner


def undo(latent: Latent, kind: str = "weight") -> None:
    """Let the weight be a parameter of this kind again, with the value that it has now."""
    holder, prefix = holder_of(latent)
    parametrize.remove_parametrizations(holder, "weight", leave_parametrized=True)
    holder.weight.requires_grad_()
    kinds = {own: each for own, each in latent.kind.items() if not own.startswith(f"{prefix}parametrizations.")}
    latent.kind = kinds | {f"{prefix}weight": kind}
