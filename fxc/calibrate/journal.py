"""What runs over calibration data have done, in a folder, so that one that is killed goes on.

Each run has a folder of its own in it, named by the hash of all that its result depends on: what a pass reads (the program and
the samples, by their bytes), the pass, versions, threads. In it

    journal.jsonl    the key, then a line for whatever is done; each holds the hash of the line before it
    stage-3.pt       what the layers of a stage became
    pending-3.pt     statistics to which later stages will add
    states-2-0.bin   the hidden states of all samples before block 2, of the first stream

A file is written under another name, synced and renamed, and only then named in the journal, with its hash. What the journal
does not name, or what is not what it says, is not there: the run begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fxc.artifact.staging import digest_of_file, locked, on_disk, sync

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Saves:
    """Where runs save what they do. in_memory: whether hidden states are kept in memory besides."""

    folder: Path
    in_memory: bool = True

    def journal(self, key: Mapping[str, Any]) -> Journal:
        """Of the run of this key (JSON), as far as an earlier process came."""
        with on_disk(self.folder):
            return Journal(self.folder, key, self.in_memory)


@contextmanager
def saving(folder: Path, *, in_memory: bool = True) -> Iterator[Saves]:
    """Save in `folder`, which no other process uses at the same time, and which stays until somebody calls `remove`. Raises
    `ResourceError` where the disk does not permit it, or another process is there."""
    folder = folder.resolve()
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            yield Saves(folder, in_memory)
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()


def remove(folder: Path) -> None:
    """Remove what runs saved in `folder`, and the folder where that was all. Raises `ResourceError` where another process is
    saving there."""
    if not folder.is_dir():
        return
    with locked(folder), on_disk(folder):
        for each in folder.glob(f"*/{JOURNAL}"):
            shutil.rmtree(each.parent)
        if not any(folder.iterdir()):
            folder.rmdir()


class Journal:
    """done: the number of stages that are; block: the one before which the hidden states are those that are there, 0 for none;
    began: how many stages an earlier process did."""

    def __init__(self, folder: Path, key: Mapping[str, Any], in_memory: bool = True) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.in_memory = in_memory
        self.block, self._last = 0, ""
        self._stages: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []
        self._pending: dict[str, Any] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self._lines(text)
        if not all(self._is_whole(entry) for entry in self._named(lines)):
            lines = []
        names = {entry["file"] for entry in self._named(lines)}
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()
        with self._written(JOURNAL) as file:
            file.write("".join(self._chained(line) for line in lines or [{"key": text}]).encode())
        self.began = self.done

    @property
    def done(self) -> int:
        return len(self._stages)

    def stage(self, number: int) -> Any:
        """What was saved of a stage."""
        return torch.load(self.folder / self._stages[number]["file"], weights_only=True)

    def pending(self) -> Any:
        """What was saved besides of the last stage; None where nothing was."""
        return torch.load(self.folder / self._pending["file"], weights_only=True) if self._pending else None

    def save_stage(self, value: Any, pending: Any = None) -> None:
        """The next stage is done. value, pending: of tensors, numbers, text, lists and dicts."""
        old = self._pending
        with self._written(f"stage-{self.done}.pt") as file:
            torch.save(value, file)
        line = {"stage": file.entry, "pending": None}
        if pending is not None:
            with self._written(f"pending-{self.done}.pt") as file:
                torch.save(pending, file)
            line["pending"] = file.entry
        self._append(line)
        if old:
            (self.folder / old["file"]).unlink()

    def states(self) -> list[tuple[Path, list[int]]]:
        """Of each stream the file with its hidden states before `block`, and where in it samples begin and the last ends."""
        return [(self.folder / entry["file"], entry["offsets"]) for entry in self._states]

    def file(self, spill: Spill) -> tuple[Path, list[int]]:
        """The same of one that was just written."""
        return self.folder / spill.entry["file"], spill.entry["offsets"]

    @contextmanager
    def spilling(self, block: int, stream: int) -> Iterator[Spill]:
        """Write the hidden states of a stream before `block`; they count when `keep_states` is called."""
        with self._written(f"states-{block}-{stream}.bin") as file:
            yield file

    def keep_states(self, block: int, spills: list[Spill]) -> None:
        """These are the hidden states from now on; those before are removed."""
        old = self.states()
        self._append({"block": block, "states": [spill.entry for spill in spills]})
        for path, _ in old:
            path.unlink()

    def finish(self) -> None:
        """All stages are done, and hidden states are needed no more."""
        if self.states():
            self.keep_states(self.block, [])

    def _lines(self, key: str) -> list[dict[str, Any]]:
        """As many lines as are whole and follow each other, if the first is of this key."""
        path = self.folder / JOURNAL
        found: list[dict[str, Any]] = []
        last = ""
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict) or line.pop("after", None) != last or (not found and line != {"key": key}):
                break
            found.append(line)
            last = hashlib.sha256(text.encode()).hexdigest()
        return found

    @staticmethod
    def _named(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of the files that are still needed."""
        states = [line["states"] for line in lines if "states" in line][-1:]
        stages = [line for line in lines if "stage" in line]
        pending = [line["pending"] for line in stages[-1:] if line["pending"]]
        return [*(line["stage"] for line in stages), *pending, *(entry for some in states for entry in some)]

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        path = self.folder / entry["file"]
        if not path.is_file():
            return False
        return digest_of_file(path) == entry["sha256"]

    def _chained(self, line: dict[str, Any]) -> str:
        if "stage" in line:
            self._stages.append(line["stage"])
            self._pending = line["pending"]
        if "states" in line:
            self.block, self._states = line["block"], line["states"]
        text = json.dumps(line | {"after": self._last}, sort_keys=True)
        self._last = hashlib.sha256(text.encode()).hexdigest()
        return text + "\n"

    def _append(self, line: dict[str, Any]) -> None:
        with on_disk(self.folder), (self.folder / JOURNAL).open("ab") as file:
            file.write(self._chained(line).encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _written(self, name: str) -> Iterator[Spill]:
        """A file that is there when the block ends, as a whole."""
        path = self.folder / f"{name}.tmp"
        with on_disk(self.folder):
            with path.open("wb") as file:
                spill = Spill(file, name)
                yield spill
                file.flush()
                os.fsync(file.fileno())
            path.rename(self.folder / name)
            sync(self.folder)


class Spill:
    """A file that is being written: its hash, and where what was written one by one begins."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._hash = file, name, hashlib.sha256()
        self._offsets = [0]

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def add(self, value: Any) -> None:
        """Write `value` as one of several."""
        torch.save(value, self)
        self._offsets.append(self._file.tell())

    @property
    def entry(self) -> dict[str, Any]:
        several = {"offsets": self._offsets} if len(self._offsets) > 1 else {}
        return {"file": self._name, "sha256": self._hash.hexdigest()} | several
