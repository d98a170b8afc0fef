"""Captures that tests share: more than half of their time was torch.export, mostly of the same small models again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fxc.frontend import capture
from fxc.frontend.calls import Call
from fxc.ir.program import Program

_KEPT: dict[str, Program] = {}
_TRACED: dict[tuple[str, int], Program] = {}
LARGEST = 100_000_000
_calls_of, _freest, _traced = capture.calls_of, capture._freest, capture._export


def _export(model: nn.Module, call: Call, reads: bool) -> Program:
    """Traced without torch's memory of what operators give for which types, which pays from eight layers on."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        return _traced(model, call, reads)


class _Calls:
    """The calls to trace, and what they are made of."""

    def __init__(self, *made_of: Any):
        self.made_of = made_of
        self.calls = _calls_of(*made_of)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)


def _remembered(model: nn.Module, calls: _Calls, check: bool, reads: bool) -> Program:
    traced = _key(model, *calls.made_of[1:3]) if reads else None
    if traced is None:
        return _freest(model, calls, check, reads)
    key = f"{traced} {check}"
    if key not in _KEPT:
        # What is checked or not is traced alike.
        capture._export = _tracing(traced)
        try:
            program = _freest(model, calls, check, reads)
        finally:
            capture._export = _export
        if program.nbytes() < LARGEST:
            _KEPT[key] = _own(program)
        return program
    return _own(_KEPT[key])


def _tracing(key: str) -> Callable[[nn.Module, Call, bool], Program]:
    """`_export` for the calls of the model and inputs `key`, in their order."""
    count = itertools.count()

    def export(model: nn.Module, call: Call, reads: bool) -> Program:
        number = next(count)
        if (key, number) in _TRACED:
            call.module(*call.inputs.values())  # which keeps what it gives
            return _own(_TRACED[key, number])
        program = _export(model, call, reads)
        if program.nbytes() < LARGEST:
            _TRACED[key, number] = _own(program)
        return program

    return export


def share(patch: Any) -> None:
    """Until `patch`, a pytest.MonkeyPatch, is undone: what was captured once in this process is not traced again."""
    patch.setattr(capture, "calls_of", _Calls)
    patch.setattr(capture, "_freest", _remembered)
    patch.setattr(capture, "_export", _export)


def apart(patch: Any) -> None:
    """Until `patch` is undone: every capture anew, for tests of what captures."""
    patch.setattr(capture, "calls_of", _calls_of)
    patch.setattr(capture, "_freest", _freest)
    patch.setattr(capture, "_export", _traced)


def _own(program: Program) -> Program:
    """A copy with constants of its own: tests change their models."""
    copied = program.copy()
    for name, tensor in copied.constants.items():
        copied.constants[name] = tensor.detach().clone()
    return copied


def _key(model: nn.Module, inputs: Any, shapes: Any) -> str | None:
    """What tracing depends on, of a model whose code no test has written; None for any other."""
    modules = list(model.modules())
    own = any(not type(each).__module__.startswith(("transformers.", "torch.nn.")) for each in modules)
    if own or any("forward" in vars(each) or each._forward_hooks or each._forward_pre_hooks for each in modules):
        return None
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    if config is None:
        return None
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    storages = [tensor.untyped_storage()._cdata for _, tensor in tensors]
    flat, structure = tree_flatten(inputs)
    said = [
        [id(type(each).forward) for each in modules], repr(model), config.to_json_string(use_diff=False),
        config._attn_implementation, generation and generation.to_json_string(), [name for name, _ in tensors],
        [storages.index(each) for each in storages], str(structure), shapes, torch.get_default_dtype(),
    ]  # fmt: skip
    digest = hashlib.blake2b(repr(said).encode())
    for each in [tensor for _, tensor in tensors] + flat:
        if isinstance(each, Tensor):
            digest.update(f"{each.dtype}{list(each.shape)}{each.stride()}{each.device}".encode())
            if not each.is_meta:
                digest.update(each.detach().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(each).encode())
    return digest.hexdigest()
