"""What a process may have set for torch, set aside while fxc works; and one compilation at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx._symbolic_trace import _Patcher
from torch.nn.modules import transformer
from torch.utils._device import DeviceContext

_PATCH = _Patcher.patch_method
_DETECT = transformer._detect_is_causal_mask

# Tracing in two threads at once, each takes the other's modes off: those before dispatch are the process's, not a thread's.
_LOCK = threading.RLock()
_P = ParamSpec("_P")
_T = TypeVar("_T")


@contextmanager
def neutral() -> Iterator[None]:
    """No autocast, no inference mode, no default device, float32 as the default dtype, and no fast path of
    nn.TransformerEncoder and nn.MultiheadAttention, which gives other numbers at padded positions than what export sees;
    nor do they look into a mask whether it is the causal one. What tracing puts in the place of nn.Module.__call__ is seen by
    this thread alone. All is as it was afterwards."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        if any(isinstance(mode, DeviceContext) for mode in modes):
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        stack.callback(setattr, transformer, "_detect_is_causal_mask", _DETECT)
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
        stack.callback(setattr, _Patcher, "patch_method", _PATCH)
        _Patcher.patch_method = _patch_for_this_thread
        yield


def _patch_for_this_thread(patcher: _Patcher, cls: type, name: str, new: Callable, deduplicate: bool = True) -> None:
    original, owner = getattr(cls, name), threading.get_ident()

    @functools.wraps(new)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == owner else original)(*args, **kwargs)

    _PATCH(patcher, cls, name, patched, deduplicate)


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function` under `neutral`, and never in two threads at once."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _LOCK, neutral():
            return function(*args, **kwargs)

    return wrapped
