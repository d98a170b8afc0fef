"""Which sizes of example inputs vary: what the caller says, and what is found by trying the model at others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from fxc.errors import CaptureFailed, UsageError, first_line

Axis = tuple[str, int]
"""An input's name and one of its dimensions."""
Run = Callable[..., Any]


@dataclass(frozen=True)
class FreeSize:
    """Axes of one size that vary together, and by how much they were seen, or are to be tried, to grow."""

    axes: frozenset[Axis]
    steps: tuple[int, int]


def owned(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies with memory of their own: of a view, torch.export asks for the tensor that it is a view of."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in inputs.items()}


def resized(inputs: Mapping[str, Tensor], by: Mapping[Axis, int]) -> dict[str, Tensor]:
    """`inputs` with some of their dimensions grown (or cut, where `by` is negative); what is added repeats what is there."""
    made = {}
    for name, tensor in inputs.items():
        for dimension, size in enumerate(tensor.shape):
            if change := by.get((name, dimension)):
                index = torch.arange(size + change, device=tensor.device) % size
                tensor = tensor.index_select(dimension, index)
        made[name] = tensor
    return made


def found_free(run: Run, inputs: Mapping[str, Tensor], known: set[Axis], fixed: set[Axis]) -> list[FreeSize]:
    """Groups of axes beyond the first that the model takes at other sizes: those of one size together, else one by one.
    known: axes of tokens, which are taken to vary without a trial; fixed: axes that are not to be tried."""
    batch = batch_of(inputs)
    axes = [(n, d) for n, t in inputs.items() for d, size in enumerate(t.shape) if size > 1 and (d > 0 or size != batch)]
    by_size: dict[int, list[Axis]] = {}
    for n, d in axes:
        if (n, d) not in fixed:
            by_size.setdefault(inputs[n].shape[d], []).append((n, d))
    groups = []
    for size, same in by_size.items():
        tokens = frozenset(same) & known
        steps = _steps(size, bool(tokens))
        if tokens == set(same) or _runs(run, inputs, same, steps[0]):
            groups.append(FreeSize(frozenset(same), steps))
            continue
        if tokens:
            groups.append(FreeSize(tokens, steps))
        alone = [axis for axis in same if axis not in tokens] if len(same) > 1 else []
        groups += [FreeSize(frozenset({axis}), steps) for axis in alone if _runs(run, inputs, [axis], steps[0])]
    return groups


def checked_free(run: Run, inputs: Mapping[str, Tensor], asked: set[Axis]) -> list[FreeSize]:
    """Groups of the axes that the caller asks to vary. Raises `CaptureFailed` where the model runs at no other size of one."""
    by_size: dict[int, list[Axis]] = {}
    for n, d in sorted(asked):
        by_size.setdefault(inputs[n].shape[d], []).append((n, d))
    groups = []
    for size, same in by_size.items():
        steps = _steps(size, False)
        if _runs(run, inputs, same, steps[0]):
            groups.append(FreeSize(frozenset(same), steps))
            continue
        for name, dimension in same:
            grown = resized(inputs, {(name, dimension): steps[0]})
            try:
                run(*grown.values())
            except Exception as error:  # the model's own code
                raise CaptureFailed(
                    f"dimension {dimension} of {name} cannot vary: the model fails where it is {size + steps[0]}",
                    why=first_line(error),
                    hint="leave it out, or name with it the dimensions of other inputs that must be equal",
                ) from error
            groups.append(FreeSize(frozenset({(name, dimension)}), steps))
    return groups


def runs(run: Run, inputs: Mapping[str, Tensor]) -> bool:
    try:
        run(*inputs.values())
    except Exception:  # the model's own code: any error of it means that it does not take these sizes
        return False
    return True


def _runs(run: Run, inputs: Mapping[str, Tensor], axes: Iterable[Axis], step: int) -> bool:
    return runs(run, resized(inputs, dict.fromkeys(axes, step)))


def _steps(size: int, is_tokens: bool) -> tuple[int, int]:
    """By how much to grow a size. What is a multiple of a power of two stays one, as networks that halve an image demand."""
    step = min(32, size & -size)
    return (5, 19) if is_tokens else (step, 3 * step)


def batch_of(inputs: Mapping[str, Tensor]) -> int:
    """The batch size: the first size of the first input that has one, 0 without any."""
    return next((t.shape[0] for t in inputs.values() if t.ndim and t.shape[0] > 1), 0)


# ---------------------------------------------------------------------------------------------------- what callers say


def asked_of(dynamic_shapes: Any, structure: Any, names: list[str], parameters: list[str]) -> dict[str, set[int]]:
    """Input -> the dimensions that the caller says vary, for the inputs that `dynamic_shapes` names.

    dynamic_shapes: {name: dimensions}, or what torch.export takes: a dict by argument or a tuple in their order, of
    {dimension: Dim}, one Dim or None a dimension, or None; nested as the inputs are. Bounds of a Dim are not kept.
    structure: the call, over indices into `names`. Raises `UsageError` for an argument or a dimension that is not there.
    """
    if dynamic_shapes is None:
        return {}
    given: dict[str, Any] = dict(structure["kwargs"])
    given |= {parameters[i] if i < len(parameters) else f"input{i}": s for i, s in enumerate(structure["args"])}
    if isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(given, dynamic_shapes))
    if not isinstance(dynamic_shapes, Mapping):
        raise UsageError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__}", hint="give {'name': (0, 1)}, or what torch.export takes"
        )
    asked: dict[str, set[int]] = {}
    for name, spec in dynamic_shapes.items():
        if name not in given and name not in names:
            raise UsageError(f"there is no input {name!r} whose sizes could vary", hint=f"it takes {', '.join(names)}")
        _collect(given.get(name, names.index(name) if name in names else None), spec, names, asked)
    return asked


def _collect(structure: Any, spec: Any, names: list[str], asked: dict[str, set[int]]) -> None:
    if isinstance(structure, int):
        asked[names[structure]] = _dimensions(names[structure], spec)
    elif spec is not None and isinstance(structure, dict):
        inner = structure.get("list", structure.get("tuple", structure.get("dict")))
        if isinstance(inner, dict) and isinstance(spec, Mapping):
            for key, child in spec.items():
                _collect(inner[key], child, names, asked)
        elif isinstance(inner, list) and isinstance(spec, (list, tuple)) and len(inner) == len(spec):
            for part, child in zip(inner, spec):
                _collect(part, child, names, asked)
        else:
            raise UsageError("dynamic_shapes is not nested as the inputs are", hint="name the tensors: {'x.0': (0, 1)}")


def _dimensions(name: str, spec: Any) -> set[int]:
    if spec is None:
        return set()
    if isinstance(spec, int):
        return {spec}
    if isinstance(spec, Mapping):
        return {d for d, dim in spec.items() if _varies(dim)}
    parts = list(spec) if isinstance(spec, (tuple, list, set, frozenset, range)) else [spec]
    if all(isinstance(part, int) for part in parts):
        return set(parts)
    if any(isinstance(part, str) for part in parts):
        raise UsageError(f"the dimensions of {name} are numbers", hint="give {'name': (0, 1)}")
    return {d for d, dim in enumerate(parts) if _varies(dim)}


def _varies(dim: Any) -> bool:
    return dim is not None and dim is not Dim.STATIC and not isinstance(dim, int)
