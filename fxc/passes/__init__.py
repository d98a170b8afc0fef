"""The passes. Every module of this package that defines a named `Pass` adds it to `--passes` by being here."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
