"""The constants of a program that is larger than memory: all of them are in files that are mapped.

What is asked for is read, and let go when others were; what a pass puts in is written, and read from there. To passes it is a
dict. Whoever writes into a tensor that it holds would lose that: passes make new ones. A thread writes while the next ones are
made.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Mapping, ValuesView
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fxc.mapped import Reading, let_go

# So much that was put in may wait in memory to be written together, and as much be written meanwhile.
PART_BYTES = 1 << 28


class Spill(Protocol):
    """Files that constants go to, and what an earlier process wrote there and was killed: see `fxc.artifact.spill`."""

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, mapped from a file that holds them all."""

    def saved(self, accept: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors that were written next, as long as `accept` takes their names: they are not given again."""

    def has_saved(self) -> bool:
        """Whether there are some that were not given again."""

    def forget(self) -> None:
        """What is saved beyond is of no use: this process does something else."""


class Constants(dict[str, Tensor]):
    """FQN -> tensor. spill: where new ones go."""

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], spill: Spill):
        super().__init__(tensors)
        self.spill = spill
        self._reading = Reading(super().values())
        self._waiting: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}
        self._writing: Future[dict[str, Tensor]] | None = None
        self._again: list[Tensor] = []

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if name not in self._waiting and name not in self._written:
            self._reading.begins(tensor)
        return tensor

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> ItemsView[str, Tensor]:
        return ItemsView(self)

    def values(self) -> ValuesView[Tensor]:
        return ValuesView(self)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self._waiting:
            # Who goes on after a kill is given each in its turn, and not the last in the place of the first.
            self.settle()
        if (written := next((other for other, each in self._written.items() if each is tensor), None)) is not None:
            # It is in a file soon, and once is enough.
            tensor = self._end()[written]
            self._reading.knows(tensor)
            super().__setitem__(name, tensor)
            return
        others = [other for other, each in super().items() if each is tensor]
        if (others and others[0] not in self._waiting) or any(each is tensor for each in self._again):
            super().__setitem__(name, tensor)
            return
        again = self.spill.saved(name.__eq__).get(name)
        if again is not None and (again.dtype, again.shape) == (tensor.dtype, tensor.shape):
            super().__setitem__(name, again)
            return
        if again is not None:
            self.spill.forget()
        last = next(reversed(self._waiting), name)
        if sum(each.nbytes for each in self._waiting.values()) >= PART_BYTES and _module(last) != _module(name):
            self._begin()
        super().__setitem__(name, tensor)
        self._waiting[name] = tensor

    def update(self, others: Mapping[str, Tensor]) -> None:
        for name, tensor in others.items():
            self[name] = tensor

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._waiting.pop(name, None)

    def pop(self, name: str, *default: Tensor) -> Tensor:
        self._waiting.pop(name, None)
        return super().pop(name, *default)

    def copy(self) -> Constants:
        """The same tensors, written first, with an order and names of its own."""
        self.settle()
        return Constants(super().items(), self.spill)

    def saved(self, accept: Callable[[str], bool]) -> dict[str, Tensor]:
        """What a process that was killed put in next, of names that `accept` takes, to be put in again."""
        found = self.spill.saved(accept)
        self._again += found.values()
        return found

    def has_saved(self) -> bool:
        """Whether a process that was killed put more in than was taken."""
        return self.spill.has_saved()

    def leave_out(self, names: Iterable[str]) -> None:
        """Keep of these, just put in, the shapes alone: another process has the numbers, and nobody reads them here."""
        for name in names:
            self._waiting.pop(name, None)
            tensor = super().__getitem__(name)
            super().__setitem__(name, torch.ones((), dtype=torch.uint8).to(tensor.dtype).expand(tensor.shape))

    def settle(self) -> None:
        """Write what waits, wait for it, and let go of what was read: who comes next has a copy, with a reading of its own."""
        self._begin()
        self._end()
        self._reading.finish()

    def _begin(self) -> None:
        """Begin to write what waits, when what was begun is written."""
        self._end()
        if not self._waiting:
            return
        # What an earlier process wrote from here on is something else.
        self.spill.forget()
        self._written, self._waiting = self._waiting, {}
        pool = ThreadPoolExecutor(1, "fxc-write")
        self._writing = pool.submit(self.spill.write, self._written)
        pool.shutdown(wait=False)

    def _end(self) -> dict[str, Tensor]:
        """Wait for what is being written, and return it. From here on it is in its file, and not in memory."""
        if self._writing is None:
            return {}
        writing, self._writing = self._writing, None
        written, self._written = self._written, {}
        mapped = writing.result()
        for name, tensor in mapped.items():
            if super().get(name) is written[name]:
                super().__setitem__(name, tensor)
                self._reading.knows(tensor)
        # What went through the page cache is in memory once it is mapped.
        let_go(mapped.values(), self._reading.clean)
        return mapped


def saved(constants: Mapping[str, Tensor], accept: Callable[[str], bool]) -> dict[str, Tensor]:
    """`Constants.saved`; nothing where they are a dict."""
    return constants.saved(accept) if isinstance(constants, Constants) else {}


def _module(name: str) -> str:
    return name.rpartition(".")[0]
