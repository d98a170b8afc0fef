"""Patterns of module names: which layers to leave alone (`--skip`), and which ones a pass is for (`only=`)."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from fxc.errors import UsageError
from fxc.ir.names import layer_name
from fxc.ir.program import Program


def matches(pattern: str, fqn: str) -> bool:
    """Whether `pattern`, a glob or "re:..." and a regular expression, means the module `fqn` or one that it is in.

    Raises `UsageError` for what is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], fqn) is not None
        except re.error as error:
            raise UsageError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    # From a dot on, so that "*.lm_head" is also the one of a model that has it at the top.
    globs = (pattern, f".{pattern}", f"*.{pattern}")
    return any(fnmatch.fnmatchcase(f".{name}", glob) for name in _and_parents(fqn) for glob in globs)


def patterns_in(text: str) -> tuple[str, ...]:
    """The patterns in `text`, which stand between semicolons."""
    return tuple(pattern for each in text.split(";") if (pattern := each.strip()))


def check_patterns(patterns: Iterable[str], program: Program, where: str) -> None:
    """Raises `UsageError` for a pattern that matches no module and no weight of `program`; where: the option it stands in."""
    names = {n: None for fqn in [*program.constants, *program.aliases] for n in _and_parents(fqn)}
    names |= {n: None for node in program.graph.nodes for n in _and_parents(node.meta.get("fqn") or "")}
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            wanted = pattern.removeprefix("re:").strip("*.^$")
            layers = list(dict.fromkeys(layer_name(n) for n in names if not n.endswith(".bias")))
            near = difflib.get_close_matches(wanted, layers, n=3, cutoff=0.4) or layers[:3]
            raise UsageError(
                f"the pattern {pattern!r} matches no layer of the model",
                where=where,
                hint=f"there are, for instance, {', '.join(near)}; 'fxc inspect' lists all",
            )


def _and_parents(fqn: str) -> list[str]:
    parts = fqn.split(".") if fqn else []
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
