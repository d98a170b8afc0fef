"""fxc: an optimizing compiler for model compression.

    model = fxc.optimize("path/to/model", passes="int8")
    model.save("out")
    model = fxc.load("out")
"""

import fxc.passes  # noqa: F401 - importing the passes registers them
import fxc_kernels.grouped_linear
import fxc_kernels.int8_linear  # noqa: F401 - importing a kernel registers its operators
from fxc.capture import capture
from fxc.compiler import load, optimize
from fxc.errors import FxcError
from fxc.ir.program import Program
from fxc.passes.base import Pass
from fxc.runtime.model import CompiledModel

__version__ = "0.1.0"
__all__ = ["CompiledModel", "FxcError", "Pass", "Program", "capture", "load", "optimize"]
