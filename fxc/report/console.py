"""What commands print: tables and progress on a terminal, plain lines elsewhere, one JSON object with --json.

Results go to stdout, progress and warnings to stderr. Names that come from a model are untrusted: every cell and line
is cleaned of control characters and taken as text, never as markup.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.status import Status
from rich.table import Table
from rich.text import Text

from fxc.errors import FxcError, printable, printable_lines
from fxc.units import ratio, size

__all__ = ["Output", "ratio", "show_error", "size"]
T = TypeVar("T")


class Output:
    """One command's output. In JSON mode `table` and `line` write nothing, and whatever else prints goes to stderr.

    Use as a context manager, so that stray prints are caught for as long as the command runs.
    """

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self._stdout = sys.stdout
        self.out = Console(file=self._stdout, highlight=False, soft_wrap=True)
        self.err = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._redirect: contextlib.AbstractContextManager = contextlib.nullcontext()

    def __enter__(self) -> Output:
        if self.as_json:
            self._redirect = contextlib.redirect_stdout(sys.stderr)
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._redirect.__exit__(*exception)

    def silence(self) -> None:
        """Print nothing from now on."""
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        self.as_json, self._stdout = False, nowhere
        self.out, self.err = (Console(file=nowhere, highlight=False, soft_wrap=True) for _ in range(2))

    def line(self, text: object = "") -> None:
        if not self.as_json:
            self.out.print(Text(printable_lines(text)))

    def block(self, text: str) -> None:
        """Many lines, written as they are but for control characters."""
        if not self.as_json:
            self._stdout.write(printable_lines(text) + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A column is right-aligned when its heading starts with '>'."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if self.as_json or not cells:
            return
        names, right = [c.removeprefix(">") for c in columns], [c.startswith(">") for c in columns]
        if self.out.is_terminal:
            table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
            for name, is_right in zip(names, right, strict=True):
                table.add_column(Text(name), justify="right" if is_right else "left", overflow="fold")
            for row in cells:
                table.add_row(*map(Text, row))
            self.out.print(table, soft_wrap=False)
            return
        widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
        self.out.print(Text(title))
        for row in [names, *cells]:
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)]
            self.out.print(Text("  " + "  ".join(padded).rstrip()))

    def json(self, value: Any) -> None:
        """The result of the command, for --json. NaN and infinities, which JSON does not have, become null."""
        if self.as_json:
            self._stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False) + "\n")

    def note(self, text: object) -> None:
        self.err.print(Text(printable(text)))

    def note_block(self, text: str) -> None:
        print(printable_lines(text), file=sys.stderr)

    def warn(self, text: object) -> None:
        self.err.print(Text(f"warning: {printable(text)}", style="yellow"))

    @contextlib.contextmanager
    def doing(self, what: str, *, elsewhere: bool = True) -> Iterator[None]:
        """Show what is being done for as long as it is: a spinner on a terminal, and elsewhere, if so asked, one line."""
        if self.err.is_terminal:
            with self.err.status(Text(printable(what))) as self._status:
                try:
                    yield
                finally:
                    self._status = None
        else:
            if elsewhere:
                self.note(f"{what} ...")
            yield

    def track(self, items: Iterable[T], what: str, count: int | None = None) -> Iterator[T]:
        """The items, at most `count`, with a bar, a count and the time left on a terminal, one line elsewhere, and nothing in
        JSON mode."""
        if self.as_json or not self.err.is_terminal:
            if not self.as_json:
                self.note(f"{what} ...")
            yield from items
            return
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with self._without_status(), Progress(*columns, console=self.err, transient=True) as progress:
            yield from progress.track(items, total=count, description=printable(what).replace("[", "\\["))

    @contextlib.contextmanager
    def _without_status(self) -> Iterator[None]:
        """The terminal shows one thing that moves at a time."""
        status = self._status
        if status is not None:
            status.stop()
        try:
            yield
        finally:
            # What failed halfway may end here long after its `doing`.
            if status is not None and status is self._status:
                status.start()


def show_error(error: FxcError) -> None:
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(Text(str(error), style="red"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
