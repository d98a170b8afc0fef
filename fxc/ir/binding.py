"""From the arguments of a call to the flat tensors of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.ir.structure import unflatten


def bind(program: Program, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The program's input tensors, from the positional and keyword arguments that the original model would take.

    Inputs with a default may be left out. What was captured as a constant, given or left out, has to be that constant.
    Raises `UsageError` naming the argument for one that is missing, unknown, of another structure or of a wrong size.
    """
    call, signature = program.signature.call, program.signature
    parameters = program.metadata.get("parameters", [])
    flat: list[Tensor | None] = [None] * len(signature.inputs)
    by_name: dict[str, Any] = dict(call["kwargs"])
    by_name |= {parameters[i]: s for i, s in enumerate(call["args"]) if i < len(parameters)}
    given, unnamed = dict(kwargs), call["args"][len(parameters) :]
    for index, value in enumerate(args):
        if index < len(call["args"]):
            name = parameters[index] if index < len(parameters) else f"argument {index}"
            if name in given:
                raise UsageError(f"the argument {name} was given twice", hint=_takes(program))
            _match(call["args"][index], value, flat, name)
            by_name.pop(name, None)
        elif index < len(parameters) and parameters[index] not in given:
            given[parameters[index]] = value
        else:
            raise UsageError(f"{len(args)} positional arguments were given", hint=_takes(program))
    for name, value in given.items():
        if name not in by_name:
            _check_as_left_out(program, name, value)
        elif value is not None or _is_constant(by_name[name]):
            _match(by_name.pop(name), value, flat, name)
    by_name |= {f"argument {i}": s for i, s in enumerate(unnamed, len(parameters)) if i >= len(args)}
    for name, structure in by_name.items():
        if name not in given and _is_constant(structure):
            _check_default(program, name, structure)
    for index in range(len(flat)):
        if flat[index] is None:
            flat[index] = _default(program, index, flat)
    return [_fit(program, i, tensor) for i, tensor in enumerate(flat)]


def _is_constant(structure: Any) -> bool:
    """Whether no tensor stands in `structure`."""
    if isinstance(structure, int):
        return False
    inner = structure.get("list", structure.get("tuple", structure.get("dict", ())))
    return all(map(_is_constant, inner.values() if isinstance(inner, dict) else inner))


def _check_default(program: Program, name: str, captured: Any) -> None:
    """Refuse a call without the argument `name` unless the original would take the captured constant then."""
    defaults = program.metadata.get("defaults", {}).get(name, [])
    if not any(_is_same(captured, unflatten(default, ())) for default in defaults):
        value = unflatten(captured, ())
        why = f"the original takes {unflatten(defaults[0], ())!r} for it" if defaults else "its default is not known"
        raise UsageError(
            f"the argument {name} is missing: the program was captured with {name}={value!r}",
            why=why,
            hint=f"give {name}={value!r}, or capture the model again without it",
        )


def _check_as_left_out(program: Program, name: str, value: Any) -> None:
    """Refuse an argument that the program was captured without, unless it is what leaving it out means."""
    defaults = program.metadata.get("defaults", {}).get(name)
    known = [{"value": None}, {"value": False}] if defaults is None else defaults
    if not any(_is_same(default, value) for default in known):
        raise UsageError(f"the program was captured without the argument {name!r}", hint=_takes(program))


def _is_same(structure: Any, value: Any) -> bool:
    try:
        _match(structure, value, [], "")
    except UsageError:
        return False
    return True


def _takes(program: Program) -> str:
    return f"it takes {', '.join(i.name for i in program.signature.inputs)}"


def _match(structure: Any, value: Any, flat: list[Tensor | None], name: str) -> None:
    if isinstance(structure, int):
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is a {type(value).__name__} and must be a tensor")
        flat[structure] = value
        return
    if "value" in structure:
        # A tensor compared with a number is a tensor, which has no one truth.
        if isinstance(value, Tensor) or value != structure["value"]:
            given = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
            raise UsageError(f"{name} is {given}; the program was captured with {structure['value']!r}")
        return
    inner = structure.get("list", structure.get("tuple", structure.get("dict")))
    if isinstance(inner, dict):
        if not isinstance(value, dict) or value.keys() != inner.keys():
            raise UsageError(f"{name} must be a dict with the keys {', '.join(inner)}")
        for key, child in inner.items():
            _match(child, value[key], flat, f"{name}.{key}")
        return
    if not isinstance(value, (list, tuple)) or len(value) != len(inner):
        raise UsageError(f"{name} must be a list or tuple of {len(inner)}")
    for index, child in enumerate(inner):
        _match(child, value[index], flat, f"{name}.{index}")


def _default(program: Program, index: int, flat: list[Tensor | None]) -> Tensor:
    declared, value = program.signature.inputs[index], program.placeholders[index].meta["val"]
    if declared.default:
        kind, _, of = declared.default.partition(":")
        names = [i.name for i in program.signature.inputs]
        like = flat[names.index(of)] if of in names else None
        if like is not None and kind in ("ones", "zeros"):
            return torch.ones_like(like) if kind == "ones" else torch.zeros_like(like)
        if like is not None and kind == "empty" and like.ndim and value.ndim == 4:
            heads, _, width = value.shape[1:]
            return torch.empty(like.shape[0], heads, 0, width, dtype=value.dtype, device=like.device)
    raise UsageError(f"the input {declared.name} is missing", hint=_takes(program))


def _fit(program: Program, index: int, tensor: Tensor) -> Tensor:
    """`tensor` if it has a shape that the program takes, in the floating-point type that it was captured with."""
    value, name = program.placeholders[index].meta["val"], program.signature.inputs[index].name
    if tensor.ndim != value.ndim:
        raise UsageError(f"the input {name} has {tensor.ndim} dimensions and must have {value.ndim}")
    for dimension, (found, wanted) in enumerate(zip(tensor.shape, value.shape, strict=True)):
        if isinstance(wanted, int) and found != wanted:
            raise UsageError(
                f"the input {name} has size {found} in dimension {dimension}; the program was captured for {wanted}",
                hint="capture the model again with an example of that size",
            )
    if tensor.is_floating_point() != value.is_floating_point():
        raise UsageError(f"the input {name} is {tensor.dtype} and must be {value.dtype}")
    return tensor.to(value.dtype)
