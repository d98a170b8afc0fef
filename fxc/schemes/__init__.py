"""Weight formats, one file each. Every module of this package that registers a `Scheme` adds its format by being here."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
