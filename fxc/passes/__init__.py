"""The passes. Every module of this package that defines a named `Pass` adds it to `--passes` by being here, and so does every
module that an installed package names (`fxc.plugins`)."""

import importlib
import pkgutil

import fxc.schemes  # noqa: F401 - the passes name its operators
from fxc.plugins import import_installed

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

import_installed()
