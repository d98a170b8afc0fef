"""fxc: an optimizing compiler for model compression.

    model = fxc.optimize("path/to/model", passes="int8")
    model.save("out")
    model = fxc.load("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxc.quantizer import announce

if TYPE_CHECKING:
    from fxc.comparison.compare import compare
    from fxc.compiled.model import CompiledModel
    from fxc.compiler import load, optimize
    from fxc.errors import FxcError
    from fxc.frontend.capture import capture
    from fxc.ir.program import Program
    from fxc.measure.sensitivity import sensitivity
    from fxc.options import Options
    from fxc.passes.base import Pass
    from fxc.selection.search import search
    from fxc.teaching import distill, recover

__version__ = "0.1.0"
__all__ = [
    "CompiledModel", "FxcError", "Options", "Pass", "Program", "capture", "compare", "distill", "load", "optimize", "recover",
    "search", "sensitivity",
]  # fmt: skip

_HOMES = {
    "CompiledModel": "fxc.compiled.model",
    "FxcError": "fxc.errors",
    "Options": "fxc.options",
    "Pass": "fxc.passes.base",
    "Program": "fxc.ir.program",
    "capture": "fxc.frontend.capture",
    "compare": "fxc.comparison.compare",
    "distill": "fxc.teaching",
    "load": "fxc.compiler",
    "optimize": "fxc.compiler",
    "recover": "fxc.teaching",
    "search": "fxc.selection.search",
    "sensitivity": "fxc.measure.sensitivity",
}


announce()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `fxc --help` need not wait seconds for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fxc' has no attribute {name!r}")
    importlib.import_module("fxc.passes")  # which registers the passes, and the operators that they use
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
