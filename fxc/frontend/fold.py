"""Weights that a module computes of other parameters at every call, seen as the plain weights that they are in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """While open, every parametrization of `torch.nn.utils.parametrize` (weight_norm, spectral_norm, orthogonal, one's own)
    and the older hooks of weight_norm and spectral_norm are replaced by their value, and tensors that were made in inference
    mode, which torch.export does not take, by copies; the model is as it was afterwards. `model` must be in evaluation mode."""
    copies: dict[int, nn.Parameter] = {}
    with ExitStack() as stack, torch.no_grad():
        for module in list(model.modules()):
            values = _computed(module)
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.is_inference():
                    values[name] = copies.setdefault(id(tensor), nn.Parameter(tensor.clone(), requires_grad=False))
            if values:
                stack.callback(_restore, module, module.__class__, dict(module.__dict__))
                _fold(module, values)
        yield


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that `module` computes of its parameters, by name."""
    values: dict[str, Tensor] = {}
    if parametrize.is_parametrized(module):
        values |= {name: getattr(module, name) for name in module.parametrizations}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            values[hook.name] = hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm):
            values[hook.name] = hook.compute_weight(module, do_power_iteration=False)
    return values


def _fold(module: nn.Module, values: dict[str, Tensor]) -> None:
    state = module.__dict__
    gone = {f"{name}_{part}" for name in values for part in ("g", "v", "orig", "u")}
    state["_parameters"] = {k: p for k, p in module._parameters.items() if k not in gone}
    state["_buffers"] = {k: b for k, b in module._buffers.items() if k not in gone}
    state["_modules"] = {k: m for k, m in module._modules.items() if k != "parametrizations"}
    hooks = module._forward_pre_hooks.items()
    state["_forward_pre_hooks"] = {k: h for k, h in hooks if not isinstance(h, (WeightNorm, SpectralNorm))}
    if parametrize.is_parametrized(module):
        module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        state.pop(name, None)
        if name in state["_buffers"]:
            state["_buffers"][name] = value
        else:
            is_parameter = isinstance(value, nn.Parameter)  # a tied weight's copy is one object in all of its places
            state["_parameters"][name] = value if is_parameter else nn.Parameter(value.detach(), requires_grad=False)


def _restore(module: nn.Module, kind: type, state: dict[str, object]) -> None:
    module.__class__ = kind
    module.__dict__.clear()
    module.__dict__.update(state)
