"""The folder of a comparison, and what is known of it when a run is killed.

    out/  int8-mode-static/            an artifact for each strategy
          compare.md, compare.json, quality_by_size.svg, quality_by_latency.svg
          .fxc-compare/model.json      which model it is a comparison of
          .fxc-compare/int8.json       what became of a strategy: the key of all that its artifact depends on, the artifact's
                                       hash or why there is none, and its quality
          .fxc-compare/int8.resume/    what its passes have learned so far

An entry is written when the artifact is there, under another name, synced and renamed. One that is damaged, has another key, or
whose artifact is not the one that it says, is as good as none: the strategy is made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fxc.artifact.manifest import MANIFEST, read_manifest, replaceable
from fxc.artifact.staging import check_target, locked, on_disk, sync
from fxc.errors import InputRefused, UsageError

STATE = ".fxc-compare"
MODEL = "model"
REPORTS = ("compare.md", "compare.json", "quality_by_size.svg", "quality_by_latency.svg")


def check_folder(out: Path, source: Path | None) -> None:
    """Raises `UsageError` or `ResourceError` for a folder that cannot be the output: what has files and is no comparison, a
    file, the current folder, the source. Writes nothing that stays."""
    check_target(out, source, _not_ours)


def _not_ours(out: Path) -> str | None:
    state = out / STATE
    return None if state.is_dir() and not state.is_symlink() else f"it is not a comparison of fxc: it has no {STATE}"


@contextmanager
def opened(out: Path, model: Mapping[str, Any], source: Path | None, *, force: bool) -> Iterator[Folder]:
    """The folder for a comparison of `model` (JSON; "program" is its hash), which no other process writes meanwhile. force:
    begin anew, whatever it is a comparison of. Raises `UsageError` for one of another model, and as `check_folder` does."""
    out = out.resolve()
    with ExitStack() as stack:
        with on_disk(out):
            check_folder(out, source)
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            check_folder(out, source)
            folder = Folder(out)
            if force:
                folder.clear()
            (out / STATE).mkdir(parents=True, exist_ok=True)
        before = folder.read(MODEL)
        if before is None:
            folder.write(MODEL, model)
        elif before.get("program") != model["program"]:
            raise UsageError(
                "the folder holds a comparison of another model", where=out, why=f"of {before.get('name')}",
                hint="give another folder; --force (force=True) begins anew in this one",
            )  # fmt: skip
        yield folder


class Folder:
    """path: of the comparison."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def artifact(self, slug: str) -> Path:
        """Where a strategy's artifact is. Raises `UsageError` for a link in its place, which leads to what is not ours."""
        path = self.path / slug
        if path.is_symlink():
            raise UsageError("a link is in the place of an artifact", where=path, hint="take it away, or give another folder")
        return path

    def resume(self, slug: str) -> Path:
        """Where a strategy's passes save what they learn."""
        return self.path / STATE / f"{slug}.resume"

    def read(self, name: str) -> dict[str, Any] | None:
        """The entry of this name; None where there is none that can be read."""
        try:
            found = json.loads((self.path / STATE / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, name: str, entry: Mapping[str, Any]) -> None:
        self.write_file(f"{STATE}/{name}.json", json.dumps(entry, sort_keys=True) + "\n")

    def write_file(self, name: str, content: str | bytes) -> None:
        """A file of the folder, which is there as a whole and on the disk, or as it was."""
        path = self.path / name
        part = path.with_name(f".{path.name}.part")
        with on_disk(self.path):
            with part.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)

    def hash_of(self, slug: str) -> str | None:
        """What the artifact of a strategy says that it is; None where there is none."""
        try:
            return read_manifest(self.artifact(slug))["sha256"]
        except InputRefused:
            return None

    def clear(self) -> None:
        """Remove what comparisons left here, and nothing else. Raises `UsageError` where files that fxc did not write are in
        one of its artifacts."""
        state = self.path / STATE
        slugs = [path.stem for path in sorted(state.glob("*.json"))]
        found = [self.artifact(slug) for slug in slugs if (self.path / slug / MANIFEST).is_file()]
        for path in found:
            if reason := replaceable(path):
                raise UsageError("an artifact will not be removed", where=path, why=reason, hint="remove it yourself")
        for path in found:
            shutil.rmtree(path)
        for name in REPORTS:
            (self.path / name).unlink(missing_ok=True)
        if state.is_dir():
            shutil.rmtree(state)
