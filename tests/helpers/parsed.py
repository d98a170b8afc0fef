"""Programs that tests share when artifacts are read: the same text is written, checked and loaded by many of them."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from fxc.artifact import store
from fxc.ir.program import Program

_KEPT: dict[tuple, Program] = {}
_parse = store.parse_program


def _remembered(text: str, constants: dict[str, Tensor] | None) -> Program:
    """The program of a text that was parsed with constants of these types: what parsing looks at."""
    if constants is None:
        return _parse(text, constants)
    types = ((name, tensor.dtype, tensor.shape, tensor.device) for name, tensor in sorted(constants.items()))
    key = hashlib.blake2b(text.encode()).digest(), tuple(types)
    if key not in _KEPT:
        program = _parse(text, constants)
        _KEPT[key] = program.copy()
        _KEPT[key].constants = dict.fromkeys(program.constants)
        return program
    program = _KEPT[key].copy()
    program.constants = {name: constants[name] for name in program.constants}
    return program


def share(patch: Any) -> None:
    """Until `patch`, a pytest.MonkeyPatch, is undone: what was read once in this process is not parsed again."""
    patch.setattr(store, "parse_program", _remembered)


def apart(patch: Any) -> None:
    """Until `patch` is undone: every text anew, for tests of reading."""
    patch.setattr(store, "parse_program", _parse)
