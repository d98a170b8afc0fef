"""What passes make of a model that is larger than memory, in files beside the output, so that one that is killed goes on.

    folder/  <key>/  part-00000.safetensors   tensors, in the order in which they were made
                     journal.jsonl            the key, then for each part its names in order and its hash

A part is written under another name, synced, read again from the disk, renamed, and then named in the journal. The key is all
that the tensors depend on: two recipes never meet. The parts become the shards of the artifact (`fxc.artifact.store`), so that
nothing is written twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fxc.artifact.shard import write_shard
from fxc.artifact.staging import digest_of_file, on_disk, sync

JOURNAL = "journal.jsonl"
_PART = "part-{:05}.safetensors"


class Spill:
    """Where the constants of one run go, in a folder that no other process uses at the same time. parts: file -> its names, of
    this run; digests: file -> its SHA-256, as the disk was found to have it. Raises `ResourceError` where it takes nothing."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.parts: dict[Path, list[str]] = {}
        self.digests: dict[Path, str] = {}
        self._saved: list[tuple[Path, str, Tensor]] = []
        with on_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = self._lines(text)
            named = {line["file"] for line in lines}
            for path in self.folder.iterdir():
                if path.name not in named and path.name != JOURNAL:
                    path.unlink()
            self._journal = [{"key": text}, *lines]
            self._rewrite()
            for line in lines:
                path = self.folder / line["file"]
                self.digests[path] = line["sha256"]
                self._saved += [(path, name, tensor) for name, tensor in _mapped(path, line["names"]).items()]

    def saved(self, accept: Callable[[str], bool]) -> dict[str, Tensor]:
        found = {}
        while self._saved and accept(self._saved[0][1]):
            path, name, tensor = self._saved.pop(0)
            self.parts.setdefault(path, []).append(name)
            found[name] = tensor
        return found

    def has_saved(self) -> bool:
        return bool(self._saved)

    def forget(self) -> None:
        self._saved = []

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._saved:
            # An earlier process wrote something else from here on.
            self.forget()
        path = self.folder / _PART.format(len(self.parts))
        with on_disk(self.folder):
            scratch = path.with_suffix(".tmp")
            digest = write_shard(scratch, tensors)
            scratch.rename(path)
            sync(self.folder)
            self._journal = self._journal[: 1 + len(self.parts)]
            self._journal.append({"file": path.name, "names": list(tensors), "sha256": digest})
            self._rewrite()
            self.parts[path], self.digests[path] = list(tensors), digest
            return _mapped(path, list(tensors))

    def _rewrite(self) -> None:
        scratch = self.folder / "journal.tmp"
        with scratch.open("w", encoding="ascii") as file:
            file.write("".join(json.dumps(line, sort_keys=True) + "\n" for line in self._journal))
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self.folder / JOURNAL)
        sync(self.folder)

    def _lines(self, key: str) -> list[dict[str, Any]]:
        """Of the parts that are whole, as many as follow each other."""
        path = self.folder / JOURNAL
        found: list[dict[str, Any]] = []
        try:
            first, *rest = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["{}"]
            if json.loads(first) != {"key": key}:
                return []
            for text in rest:
                line = json.loads(text)
                part = self.folder / _PART.format(len(found))
                if line["file"] != part.name or not part.is_file() or digest_of_file(part) != line["sha256"]:
                    break
                found.append(line)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            pass
        return found


def _mapped(path: Path, names: list[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in names}
