"""What a command that fails says, and the exit code that it ends with."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from fxc.errors import FxcError, ResourceError, UsageError, printable


class Commands(TyperGroup):
    """Turns exceptions into an exit code and a text on stderr, or with --json a JSON object on stdout: {"error": ...}."""

    as_json = False

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:
        args = given = _with_bare_plan(sys.argv[1:] if args is None else list(args))
        self.as_json = "--json" in itertools.takewhile(lambda each: each != "--", given)
        if not self.as_json:
            return super().main(args, **options)
        try:
            code = super().main(given, **(options | {"standalone_mode": False}))
        except Exception as error:
            # Typer's own: a wrong option, a missing argument.
            if not hasattr(error, "format_message"):
                raise
            command = error.ctx.command_path if getattr(error, "ctx", None) else None
            hint = f"'{command} --help' says what it takes" if command else None
            self._show(UsageError(error.format_message(), where=command, hint=hint))
            code = error.exit_code
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxcError as error:
            self._fail(error, error)
        except KeyboardInterrupt:
            if self.as_json:
                print(json.dumps({"error": {"kind": "Interrupted"}}))
            else:
                print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except MemoryError as error:
            self._fail(ResourceError("out of memory", hint="use a machine with more memory, or a smaller --dtype"), error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            self._fail(_unexpected(error), error)
        except Exception as error:
            # Typer's own exceptions (a wrong option, an exit code) carry what it needs to handle them.
            if hasattr(error, "exit_code"):
                raise
            if type(error).__name__ == "OutOfMemoryError":
                self._fail(ResourceError("the device is out of memory", why=str(error).partition(".")[0]), error)
            self._fail(_unexpected(error), error)

    def _fail(self, shown: FxcError, cause: BaseException) -> None:
        if os.environ.get("FXC_TRACE"):
            import traceback

            traceback.print_exception(cause, file=sys.stderr)
        self._show(shown)
        raise typer.Exit(shown.exit_code) from None

    def _show(self, error: FxcError) -> None:
        if self.as_json:
            print(json.dumps({"error": error.as_json()}, indent=2))
        else:
            from fxc.report.console import show_error

            show_error(error)


def _with_bare_plan(given: list[str]) -> list[str]:
    """--plan without a file, which Typer has no word for: what follows it is another option, the model, or nothing."""
    made = list(given)
    for at, each in enumerate(given):
        follows = given[at + 1] if at + 1 < len(given) else "-"
        if each == "--plan" and (follows.startswith("-") or os.path.isdir(follows)):
            made[at] = "--plan-only"
    return made


def _unexpected(error: Exception) -> FxcError:
    return FxcError(
        f"{type(error).__name__}: {printable(error)[:500]}",
        hint="this is a fault of fxc: run the command again with FXC_TRACE=1 for the trace, and report it",
    )
