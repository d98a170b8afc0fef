"""A batch norm that goes by the statistics of the batch while it is trained, and keeps their running means."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fxc.ir.call import Call
from fxc.ir.program import Program


class BatchNorm(nn.Module):
    """x [B, C, ...], weight and bias [C] or None. In evaluation, and of a batch with one number a channel, by the running
    statistics.
    names: of the constants that hold these."""

    def __init__(self, names: tuple[str, str], mean: Tensor, var: Tensor, momentum: float, eps: float) -> None:
        super().__init__()
        self.names, self.momentum, self.eps = names, momentum, eps
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", var.clone())

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> BatchNorm | None:
        """Of a call of `aten.batch_norm` whose statistics are constants."""
        call = Call(node)
        kept = [call["running_mean"], call["running_var"]]
        if call["training"] or not all(isinstance(each, fx.Node) and each.op == "get_attr" for each in kept):
            return None
        names = tuple(each.target for each in kept)
        return cls(names, *(program.constants[name] for name in names), call["momentum"], call["eps"])

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        trains = self.training and x.numel() > x.shape[1]
        return nn.functional.batch_norm(x, self.mean, self.var, weight, bias, trains, self.momentum, self.eps)

    def stored(self) -> dict[str, Tensor]:
        """Name -> the statistics."""
        return {name: each.detach().clone() for name, each in zip(self.names, (self.mean, self.var))}
