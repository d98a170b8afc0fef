"""Tensors whose numbers are in files that are mapped into memory, as those of an artifact are: what was read of them is let go
again, and comes back from the file where somebody reads it once more."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
_DONT_NEED = 4
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
Ranges = list[tuple[int, int]]
# So much may be in memory beside what is made of it.
READ_BYTES = 1 << 27
# What is larger is let go piece by piece while it is read.
LARGE = 2 * READ_BYTES
# Of what is freed so much is kept.
KEPT_BYTES = 1 << 29
# To ask the system what is mapped takes up to a tenth of a second, for which less than this is not worth it.
LEAST_BYTES = 1 << 24


class Reading:
    """Tensors that are read one after another, and let go whenever they are READ_BYTES together. Used in a `with`, whose end
    lets go of the last ones. among: those that may be mapped, if nobody writes to them as long as this is there."""

    def __init__(self, among: Iterable[Tensor] | None = None) -> None:
        self._read: list[Tensor] = []
        self._bytes = 0
        # Held, so that nothing else comes to be at their addresses.
        self._mapped: list[Tensor] = []
        self.clean: Ranges | None = None
        if among is not None:
            among, self.clean = list(among), []
            found = unwritten() if sum(each.nbytes for each in among) >= LEAST_BYTES else []
            for each in among:
                if _is_within(each, found):
                    self.knows(each)
            _OPEN.add(self)

    def knows(self, tensor: Tensor) -> None:
        """`tensor` is mapped from a file, and nobody writes to it."""
        self._mapped.append(tensor)
        self.clean.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))

    def __enter__(self) -> Reading:
        return self

    def begins(self, tensor: Tensor) -> None:
        """`tensor` is about to be read. The last READ_BYTES that were stay, for whoever reads the largest of them may ask for
        others meanwhile."""
        self._read.append(tensor)
        self._bytes += tensor.nbytes
        gone = []
        while self._bytes - self._read[0].nbytes >= READ_BYTES:
            gone.append(self._read.pop(0))
            self._bytes -= gone[-1].nbytes
        if gone:
            let_go(gone, self.clean)

    def done(self, tensors: Iterable[Tensor]) -> None:
        for each in tensors:
            self._read.append(each)
            self._bytes += each.nbytes
        if self._bytes > READ_BYTES:
            self.finish()

    def __exit__(self, *error: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Let go of what was read last."""
        let_go(self._read, self.clean)
        self._read.clear()
        self._bytes = 0


_OPEN: weakref.WeakSet[Reading] = weakref.WeakSet()


def passed(piece: Tensor) -> None:
    """`piece` of a large tensor was read, and may go where a `Reading` knows that it is mapped."""
    any(let_go([piece], each.clean) for each in list(_OPEN))


def pieces(tensor: Tensor, nbytes: int = READ_BYTES) -> Iterator[Tensor]:
    """`tensor` in parts along its first dimension, of `nbytes` at most where an index of it has no more; of a large one each is
    `passed` when the next is asked for."""
    for piece in tensor.split(max(len(tensor) * nbytes // max(tensor.nbytes, 1), 1)):
        yield piece
        if tensor.nbytes > LARGE:
            passed(piece)


def let_go(tensors: Iterable[Tensor], clean: Ranges | None = None) -> int:
    """Let the pages of those `tensors` go that lie in the mapping of a file and are as the file is. Returns their bytes: 0
    where nothing is mapped, where a mapping was written to, where all are less than LEAST_BYTES, and where there is no /proc
    that says so. clean: what `unwritten` said."""
    found, tensors = 0, list(tensors)
    if clean is None:
        clean = unwritten() if sum(each.nbytes for each in tensors) >= LEAST_BYTES else []
    if not clean:
        return 0
    page, madvise = mmap.PAGESIZE, ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.is_mkldnn or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
        is_clean = begin < end and any(start <= begin and end <= stop for start, stop in clean)
        if is_clean and madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED) == 0:
            found += end - begin
    return found


def in_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of those of `tensors` that lie in no mapping of a file that is as the file is; 0 where nobody knows."""
    clean = unwritten()
    return sum(each.nbytes for each in tensors if each.device.type == "cpu" and not _is_within(each, clean)) if clean else 0


def _is_within(tensor: Tensor, clean: Ranges) -> bool:
    if tensor.device.type != "cpu" or tensor.is_mkldnn or not tensor.is_contiguous():
        return False
    begin = tensor.data_ptr()
    return any(a <= begin and begin + tensor.nbytes <= b for a, b in clean)


def give_back() -> None:
    """Give the system what is free of this process's heap, of which the C library keeps what lies below something in use."""
    with contextlib.suppress(AttributeError, OSError):  # a C library that is not GNU's
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Have the C library keep what is freed for what is asked for next, at the top of its heap up to KEPT_BYTES: pages that are
    new to a process can take longer than what is computed in them. Until `keep_no_more`."""
    _thresholds(1 << 30, KEPT_BYTES)


def keep_no_more() -> None:
    """Give back what `keep_freed` kept, and let the C library do as it does by itself at most."""
    _thresholds(1 << 25, 1 << 26)
    give_back()


def _thresholds(mapped: int, trimmed: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # a C library that is not GNU's
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, mapped)
        mallopt(_TRIM_THRESHOLD, trimmed)


def unwritten() -> Ranges:
    """From where to where files are mapped of whose pages this process has no copies of its own, as it has where it wrote."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    found: Ranges = []
    for line in lines:
        if header := _HEADER.match(line):
            start, stop, inode = int(header[1], 16), int(header[2], 16), int(header[3])
            if inode:
                found.append((start, stop))
        elif line.startswith(("Anonymous:", "Swap:")) and line.split()[1] != "0":
            found = [each for each in found if each != (start, stop)]
    return found
