"""Types of values: run an operator on fake tensors to learn the shape and dtype of what it returns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
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
    """The value that `target` returns for the types in `args` and `kwargs`, where a node stands for its own type.

    The same operator of the same types returns the same type: the layers of a model repeat each other, and torch takes
    milliseconds for each call whose sizes are symbols. Values may therefore be shared by nodes, and are never written to."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    key = _key(target, args, kwargs)
    # Kept by the mode itself: its values refer to it, so that a table of weak references would keep both alive.
    known = vars(mode).setdefault("_fxc_known", {})
    if key is not None and key in known:
        return known[key]
    # The Python dispatcher is what export traces under: some composite operators are symbolic only there.
    lengths = symbolic_lengths() if target in OPERATORS else nullcontext()
    # What repeats is known here, and torch takes longer to remember a call with symbols than to make it.
    with disable_fake_tensor_cache(mode), mode, torch.no_grad(), enable_python_dispatcher(), lengths:
        value = target(*args, **kwargs)
    if key is not None:
        known[key] = value
    return value


class _Unknown(Exception):
    """A type that has more to it than its key would say."""


def _key(target: Any, args: tuple, kwargs: dict) -> tuple | None:
    """What the type of the result depends on; None where the next call has to return another one: a size that only data
    tells is a new symbol each time."""
    if not isinstance(target, OpOverload) or _NEW_SYMBOLS.intersection(target.tags):
        return None
    surroundings = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    try:
        return target, surroundings, _said(args), _said(kwargs)
    except _Unknown:
        return None


_NEW_SYMBOLS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _said(value: Any) -> Any:
    """What of an argument the type of a result can depend on, to be compared."""
    if isinstance(value, FakeTensor):
        if value.layout != torch.strided or value.constant is not None:
            raise _Unknown
        sizes = tuple(_said(each) for each in (*value.shape, *value.stride(), value.storage_offset()))
        return value.dtype, value.device, value.requires_grad, value.is_inference(), sizes
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_said, value))
    if isinstance(value, dict):
        return tuple((name, _said(each)) for name, each in value.items())
    if isinstance(value, _SYMBOLIC):
        return type(value), value.node.expr
    if isinstance(value, Tensor):
        raise _Unknown
    return type(value), value  # 1, 1.0 and True are equal
