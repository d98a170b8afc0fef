"""What tests of removal share: canonical programs, what removal leaves of them, how far apart two are; toy models."""

from __future__ import annotations

import torch
from axes import canonical, toy
from torch import Tensor, nn

from fxc.data.samples import samples
from fxc.ir.check import check
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.passes.base import Context, Result
from fxc.passes.dead_structure.dead_structure import DeadStructure
from fxc.passes.float64 import in_float64
from fxc.verify.compare import relative_error

EXACT = 1e-10


def sliced(program: Program) -> tuple[Program, Result]:
    """What dead_structure makes of it. A second run has to find nothing."""
    after = program.copy()
    result = DeadStructure().run(after, Context())
    check(after)
    again = after.copy()
    assert DeadStructure().run(again, Context()).changed == 0, "a second run found something to remove"
    assert str(again) == str(after)
    return after, result


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in inputs]


def difference(before: Program, after: Program, result: Result) -> float:
    """The largest relative error in float64, at three sizes."""
    wide = in_float64(before), in_float64(after)
    errors = []
    for inputs in map(doubled, samples(before)):
        expected = result.interface.outputs(before, run(wide[0], inputs))
        assert any(t.is_floating_point() and t.isfinite().all() and t.any() for t in expected), "nothing to compare"
        errors.append(relative_error(run(wide[1], result.interface.inputs(before, inputs)), expected))
    assert len(errors) == 3
    return max(errors)


def shapes(program: Program) -> dict[str, list[int]]:
    return {fqn: list(tensor.shape) for fqn, tensor in program.constants.items()}


def with_forward(function, **modules) -> nn.Module:
    torch.manual_seed(3)
    model = toy(function, **modules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def removed_from(model: nn.Module, x: Tensor) -> tuple[Program, Result]:
    """What is left of a float64 model, compared with the model itself and with what it was captured as at three sizes."""
    x = x.double() if x.is_floating_point() else x
    before = canonical(model, (x,))
    after, result = sliced(before)
    assert difference(before, after, result) <= EXACT
    with torch.no_grad():
        assert relative_error(run(after, [x]), [model(x)]) <= EXACT
    return after, result


class Attention(nn.Module):
    """A residual attention layer of 4-wide heads. how: how keys and values are shared; masked: by zeros and -inf."""

    def __init__(self, heads: int = 4, kv: int = 4, how: str = "expand", masked: bool = False, bias: bool = True):
        super().__init__()
        torch.manual_seed(11)
        self.heads, self.kv, self.how, self.masked = heads, kv, how, masked
        self.q, self.k, self.v = (nn.Linear(10, 4 * n) for n in (heads, kv, kv))
        self.o = nn.Linear(4 * heads, 10, bias=bias)
        self.double()

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.heads, 4).transpose(1, 2)
        k, v = (p(x).view(b, s, self.kv, 4).transpose(1, 2) for p in (self.k, self.v))
        each = self.heads // self.kv
        if self.how == "expand" and each > 1:
            k, v = (t[:, :, None].expand(b, self.kv, each, s, 4).reshape(b, self.heads, s, 4) for t in (k, v))
        elif self.how == "interleave":
            k, v = (t.repeat_interleave(each, dim=1) for t in (k, v))
        attention = torch.nn.functional.scaled_dot_product_attention
        if self.masked:
            lower = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
            y = attention(q, k, v, attn_mask=torch.where(lower, 0.0, float("-inf")).to(x.dtype))
        else:
            y = attention(q, k, v, is_causal=True, enable_gqa=self.how == "enable_gqa")
        return x + self.o(y.transpose(1, 2).reshape(b, s, 4 * self.heads))
