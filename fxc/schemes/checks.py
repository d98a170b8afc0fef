"""What every weight format asks of a weight."""

from torch import Tensor

from fxc.errors import InputRefused


def check_weight(weight: Tensor, scheme: str) -> None:
    """Raise InputRefused unless `weight` is a matrix of finite floating-point numbers, float32 having room for them."""
    check_matrix(weight, scheme)
    finite = weight.detach().float().isfinite().all(dim=1)
    if not finite.all():
        raise InputRefused(
            f"the weight holds NaN or Inf, which {scheme} cannot express",
            why=f"{int((~finite).sum())} of its {weight.shape[0]} output channels are affected",
            hint="check the checkpoint, or leave this layer out with skip=",
        )


def check_matrix(weight: Tensor, scheme: str) -> None:
    """Raise InputRefused unless `weight` is a matrix of floating-point numbers."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputRefused(
            f"only a floating-point matrix can be stored as {scheme}",
            why=f"this one is {weight.dtype} with shape {tuple(weight.shape)}",
        )
