"""Where an export goes: a folder that is written as a whole or not at all, and that replaces nothing but its like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from fxc.artifact.staging import check_target, staged
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.safety import check_relative_name, listed

MARK = "fxc_export.json"
"""What says that fxc wrote the folder: {"format": as `fxc export --format` calls it, "version": of fxc}."""


def check_has_values(program: Program, folder: str | Path) -> None:
    """Raises `UsageError` for a program on meta."""
    if program.is_on_meta:
        raise UsageError("the program has no values", where=folder, hint="load the model's weights before compiling it")


@dataclass(frozen=True)
class Target:
    """format: as `fxc export --format` calls it; kind: what such a folder is called; weights: the pattern of its weight files;
    own: other files that the export writes; marked: the one of them without which it is none;
    files: the model's own that are put beside them; overwrite: whether a folder may be replaced that holds nothing but such an
    export; sources: folders that may not be touched."""

    folder: Path
    format: str
    kind: str
    weights: str
    own: frozenset[str] = frozenset()
    marked: str | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    overwrite: bool = False
    sources: Sequence[Path] = ()

    def check(self) -> None:
        """Before anything is computed: raises `UsageError` where the folder cannot be the target, `InputRefused` for a name
        of a file that leads out of it."""
        for name in self.files:
            check_relative_name(name, where="files")
        for source in self.sources:
            check_target(self.folder, source, lambda _: None)
        check_target(self.folder, None, self._foreign if self.overwrite else None)

    @contextmanager
    def staged(self, nbytes: int) -> Iterator[Path]:
        """An empty folder to fill with so many bytes, which takes the place of the target, with its mark, when the block
        ends."""
        with staged(self.folder, nbytes=nbytes, may_replace=self._foreign if self.overwrite else None) as place:
            yield place
            says = {"format": self.format, "version": metadata.version("fxc")}
            (place / MARK).write_text(json.dumps(says) + "\n", encoding="ascii")

    def _foreign(self, out: Path) -> str | None:
        """Why `out` must not be replaced, or None: it may hold only what an export writes."""
        present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink() or not p.is_dir()}
        weights = {p.name for p in out.glob(self.weights)}
        if not weights or (self.marked and self.marked not in present):
            return f"it is no {self.kind}"
        others = present - weights - self.own - self.files.keys() - {MARK}
        return f"it holds files that this export does not write: {listed(others)}" if others else None
