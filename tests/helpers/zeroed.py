"""Models with parts that are zero."""

from __future__ import annotations

import functools

import torch
from families import build
from removal import Attention, canonical, with_forward
from torch import Tensor, nn

from fxc.compiled.model import compiled_model
from fxc.ir.program import Program
from fxc.passes.float64 import in_float64


@functools.cache
def family(name: str) -> tuple[nn.Module, Program]:
    model, example = build(name)
    return model, canonical(model, example)


def generated(program: Program, model: nn.Module, ids: Tensor) -> Tensor:
    # In float64, so that no tie is broken by rounding.
    compiled = compiled_model(in_float64(program, typed=True), {}, config=model.config)
    return compiled.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)


def mlp(bias: bool = True, act=torch.nn.functional.gelu) -> nn.Module:
    def forward(self, x):
        return x + self.down(act(self.up(x)))

    return with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6, bias=bias))


def convolutions(padding: int, act=torch.relu, norm: bool = True, second_bias: bool = True) -> nn.Module:
    def forward(self, x):
        y = self.first(x)
        return self.second(act(self.norm(y) if norm else y))

    return with_forward(
        forward, first=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8),
        second=nn.Conv2d(8, 5, 3, padding=padding, bias=second_bias),
    )  # fmt: skip


PICTURES = (2, 3, 9, 9)
TOKENS = (2, 5, 10)


def rows(*heads: int) -> list[int]:
    return [4 * h + i for h in heads for i in range(4)]


def zero_heads(model: Attention, where: str, *heads: int) -> None:
    with torch.no_grad():
        if where == "o columns":
            model.o.weight[:, rows(*heads)] = 0
        else:
            for layer in (model.v,) if where == "v rows" else (model.q, model.k, model.v):
                layer.weight[rows(*heads)] = 0
                if where != "v weight rows":
                    layer.bias[rows(*heads)] = 0
