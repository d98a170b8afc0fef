"""Numbers in a program's text, and what Python's own functions may do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxc.ir.tokens import Bad


def integer_of(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and is_small(int(text))):
        raise Bad(f"{text[:40]!r} is not a whole number of 64 bits")
    return int(text)


def is_small(value: Any) -> bool:
    """False for a whole number of more than 64 bits: arithmetic on such numbers can take any time and memory."""
    if isinstance(value, torch.SymInt):
        value = value.node.hint if value.node.has_hint() else 0
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def check_numbers(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Python's own functions take numbers here and nothing else; their other meanings (repeating a list, say) are not
    part of a program."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    if name == "operator.getitem":
        allowed = len(values) == 2 and isinstance(args[0], fx.Node) and isinstance(values[0], (list, tuple))
        values = values[1:]
    else:
        allowed = True
        if name == "torch.sym_sum" and len(args) == 1 and isinstance(args[0], list):
            values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args[0]]
    if name == "operator.pow":
        allowed = len(values) == 2 and type(values[1]) in (int, float) and abs(values[1]) <= 64
    if kwargs or not allowed or not all(isinstance(v, numbers) for v in values):
        raise Bad(f"{name} is for numbers here")
