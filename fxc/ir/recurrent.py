"""Types of torch's recurrent operators at any length. Torch learns them by running every step, which makes the number of
steps a constant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
OPERATORS = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
_KERNELS = [(op, key, op.py_kernels[key]) for op in OPERATORS for key in _KEYS if key in op.py_kernels]


@contextmanager
def symbolic_lengths() -> Iterator[None]:
    """While open, tracing takes the types of LSTM, GRU and RNN from the rules below."""
    try:
        for op, key, _ in _KERNELS:
            op.py_kernels[key] = _lstm if op is torch.ops.aten.lstm.input else _gru
            op._dispatch_cache.clear()
        yield
    finally:
        for op, key, kernel in _KERNELS:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


def _lstm(input: Tensor, hx: list[Tensor], params: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, cell = hx
    return _output(input, hidden, rest[4]), torch.empty_like(hidden), torch.empty_like(cell)


def _gru(input: Tensor, hx: Tensor, params: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return _output(input, hx, rest[4]), torch.empty_like(hx)


def _output(input: Tensor, hidden: Tensor, bidirectional: bool) -> Tensor:
    """[..., features] -> [..., directions x hidden]."""
    return input.new_empty([*input.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1)])
