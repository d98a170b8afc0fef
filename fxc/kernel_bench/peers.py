"""Rivals of fxc's kernels. They come from outside: this package knows fxc's products and torch's own, and no other library."""

from __future__ import annotations

import importlib
import os
import sys

from fxc.errors import UsageError, first_line
from fxc.kernel_bench.contender import Contender
from fxc.kernel_bench.run import Platform

WHERE = "rivals besides torch's own products: --peers MODULE; fxc's repository has benchmarks.kernel_peers"


def load(module: str, schemes: tuple[str, ...], platform: Platform) -> list[Contender]:
    """What `contenders(schemes, platform)` of a module gives, which is imported with the current folder importable.

    Raises UsageError where there is no such module or function.
    """
    here = os.getcwd()
    # Last: in fxc's repository a folder has the name of a package of Hugging Face's.
    sys.path.append(here)
    try:
        contenders = importlib.import_module(module).contenders
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"no rivals in {module}", where="--peers", why=first_line(error),
            hint="a module with contenders(schemes, platform), importable from here",
        ) from error  # fmt: skip
    else:
        return contenders(schemes, platform)
    finally:
        sys.path.remove(here)
