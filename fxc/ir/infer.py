"""Types of values: run an operator on fake tensors to learn the shape and dtype of what it returns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxc.ir.recurrent import OPERATORS, symbolic_lengths


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The one fake mode that the graph's values live in."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise ValueError("the graph has no typed value")


def new_symbols(hints: list[int]) -> tuple[FakeTensorMode, list[torch.SymInt]]:
    """A fresh fake mode and one symbolic size for each example value in `hints`."""
    env = ShapeEnv()
    symbols = []
    for index, hint in enumerate(hints):
        source = ConstantSource(f"s{index}")
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        symbols.append(env.create_symintnode(symbol, hint=hint, source=source))
    # An operator that has no rule for its type would be run on real data to learn it: that is refused.
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=False, allow_fallback_kernels=False), symbols


def fake_constant(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    """The type of a constant. Always of the device "cpu": a program does not say where it will run."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def infer(mode: FakeTensorMode, target: Any, args: tuple, kwargs: dict) -> Any:
    """The value that `target` returns for the types in `args` and `kwargs`, where a node stands for its own type."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    # The Python dispatcher is what export traces under: some composite operators are symbolic only there.
    lengths = symbolic_lengths() if target in OPERATORS else nullcontext()
    with mode, torch.no_grad(), enable_python_dispatcher(), lengths:
        return target(*args, **kwargs)
