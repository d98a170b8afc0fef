"""fxc: an optimizing compiler for model compression.

    model = fxc.optimize("path/to/model", passes="int8")
    model.save("out")
    model = fxc.load("out")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxc.capture import capture
    from fxc.compiler import load, optimize
    from fxc.errors import FxcError
    from fxc.ir.program import Program
    from fxc.passes.base import Pass
    from fxc.runtime.model import CompiledModel

__version__ = "0.1.0"
__all__ = ["CompiledModel", "FxcError", "Pass", "Program", "capture", "load", "optimize"]

_HOMES = {
    "CompiledModel": "fxc.runtime.model",
    "FxcError": "fxc.errors",
    "Pass": "fxc.passes.base",
    "Program": "fxc.ir.program",
    "capture": "fxc.capture",
    "load": "fxc.compiler",
    "optimize": "fxc.compiler",
}


class _Package(ModuleType):
    """Imports the public names when they are first used: `fxc --help` need not wait seconds for torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'fxc' has no attribute {name!r}")
        importlib.import_module("fxc.passes")  # which registers the passes, and the operators that they use
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule here: the module fxc.capture must not hide the function fxc.capture.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
