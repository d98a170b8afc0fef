"""Passes and formats from outside: modules that define a `fxc.Pass`, or register a `Scheme`, when they are imported.

An installed package names such modules under the entry point group `fxc.passes`, and they are imported with fxc's own passes;
any other module is imported by whoever wants it, on the command line by --plugin. A report names the module that each pass
came from. Loading an artifact imports nothing that the artifact names.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from fxc.errors import UsageError, first_line, printable

GROUP = "fxc.passes"
FAILED: dict[str, str] = {}
"""Module of an installed plugin that could not be imported -> why, with the name of its package."""


def import_installed() -> None:
    """Import what installed packages name under the group. One that fails is a warning, and is named where it is missed."""
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda each: each.module):
        try:
            importlib.import_module(entry.module)
        except Exception as error:  # another package's code: whatever it raises
            package = entry.dist.name if entry.dist is not None else "an installed package"
            FAILED[entry.module] = f"{package}: {type(error).__name__}: {first_line(error)}"
            warnings.warn(f"the plugin {entry.module} is left out: {FAILED[entry.module]}", stacklevel=2)


def import_plugin(module: str) -> None:
    """Import `module`, with the current folder importable. Raises `UsageError` where it is not there or fails."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.import_module(module)
    except Exception as error:  # the user's code: whatever it raises
        raise UsageError(
            "the plugin cannot be imported",
            where=f"--plugin {module}",
            why=f"{type(error).__name__}: {first_line(error)}",
            hint=f"python -c 'import {module}' shows the whole traceback; it is the name of a module, not of a file",
        ) from error
    finally:
        sys.path.remove(here)


def origin_of(cls: type) -> dict[str, str] | None:
    """Where a class comes from, as a report says it: its module, and of a package that is installed name and version. None for
    fxc's own."""
    top = cls.__module__.partition(".")[0]
    if top == "fxc":
        return None
    origin = {"module": cls.__module__}
    if packages := metadata.packages_distributions().get(top):
        origin |= {"package": packages[0], "version": metadata.version(packages[0])}
    return origin


def named_in(report: Any) -> dict[str, str]:
    """Module -> how people call it, of the plugins whose passes a report names; anybody may have written that."""
    passes = report.get("passes") if isinstance(report, Mapping) else None
    found = {}
    for each in passes if isinstance(passes, list) else []:
        origin = each.get("plugin") if isinstance(each, Mapping) else None
        if isinstance(origin, Mapping) and isinstance(module := origin.get("module"), str):
            package, version = origin.get("package"), origin.get("version")
            found[module] = printable(f"{module} ({package} {version})" if package else module)[:200]
    return found


def not_imported(report: Any) -> tuple[str, str] | None:
    """Why a program that plugins had a part in may not be understood, and what to do: None where all of them are imported."""
    lacking = {module: name for module, name in named_in(report).items() if module not in sys.modules}
    if not lacking:
        return None
    failed = "".join(f"; {module} could not be imported: {FAILED[module]}" for module in lacking if module in FAILED)
    why = f"it was made with passes of {', '.join(lacking.values())}, which this process has not imported{failed}"
    options = " ".join(f"--plugin {module}" for module in lacking)
    return why, f"install what brings it, or import {', '.join(lacking)} before fxc.load; on the command line {options}"
