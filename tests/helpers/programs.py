"""Programs, and their text without its head."""

from __future__ import annotations

from fxc.ir import print_program


def body(program) -> str:
    """The lines of the values and of the result."""
    return "\n".join(line for line in print_program(program).splitlines() if line.startswith(("%", "return")))
