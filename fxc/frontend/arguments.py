"""The arguments of a model's forward, and what leaving one out means."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from fxc.errors import UsageError
from fxc.frontend.calls import Call
from fxc.ir.structure import flatten


def parameter_names(model: nn.Module) -> list[str]:
    """The names of the arguments of the model's forward, in order, for callers who give them by position."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def defaults(model: nn.Module, call: Call) -> dict[str, list[Any]]:
    """Name of an argument that no tensor was given for -> what leaving it out means: the values, as structures, that give
    the same. Hugging Face models put their configuration's value for None. What is no plain value is left out."""
    bound = call.call["kwargs"] | dict(zip(parameter_names(model), call.call["args"]))
    config = getattr(model, "config", None) if hasattr(model, "main_input_name") else None
    declared = {n: p.default for n, p in inspect.signature(model.forward).parameters.items()}
    meanings: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*declared, *bound]):
        default = declared.get(name, inspect.Parameter.empty)
        values = [] if default is inspect.Parameter.empty else [default]
        if name in call.module.options:
            values = [call.module.options[name], None]
        elif name not in declared or values == [None]:
            values = [getattr(config, name), None] if getattr(config, name, None) is not None else values
        tensors: list[Tensor] = []
        try:
            found = [flatten(v, tensors, []) for v in values]
        except UsageError:
            continue
        if found and not tensors and not isinstance(bound.get(name), int) and _is_finite(found):
            meanings[name] = found
    return meanings


def _is_finite(value: Any) -> bool:
    """Whether JSON has every number in `value`."""
    if isinstance(value, (list, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)
