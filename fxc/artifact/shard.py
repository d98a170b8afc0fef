"""Files of safetensors, written as the library writes them, but in little memory and time: past the page cache where the file
system can, each piece hashed while the one before it is on its way to the disk.

    8 bytes, little-endian: n    n bytes of JSON, filled up with spaces    the tensors' bytes, dtype after dtype, then by name
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.errors import VerificationFailed
from fxc.mapped import passed

# Numbers of the largest dtypes come first, which keeps all of them aligned; this is the library's order of
# those that it gives back as tensors.
_ORDER = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANKS = {dtype: rank for rank, dtype in enumerate(_ORDER)}
# What goes past the page cache has to begin and end at whole blocks of the disk, in files and in memory.
_BLOCK = 1 << 12
_PIECE = 1 << 23
# So many pieces are in memory: one is filled, one hashed, one written.
_BUFFERS = 3
# Less than this is written faster through the cache.
_LEAST = 1 << 24


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file with `tensors`, on the CPU and of any strides, have it on the disk, read it again from there, and return the
    SHA-256 of its bytes. Raises `VerificationFailed` for a dtype that the format has not, and OSError, also where the disk has
    other bytes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _ORDER:
            kind = str(tensor.dtype).removeprefix("torch.")
            hint = "use complex64" if tensor.is_complex() else "store it in another dtype"
            raise VerificationFailed(f"safetensors has no {kind}", where=name, hint=hint)
    ordered = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {}
    end = 0
    for name in ordered:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _ORDER[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    first = torch.frombuffer(bytearray(len(raw).to_bytes(8, "little") + raw), dtype=torch.uint8)
    pieces = chain([first], _pieces(tensors[name] for name in ordered))
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        digest = _write(handle, pieces, len(first) + end)
        os.fsync(handle)
    finally:
        os.close(handle)
    if digest_on_disk(path) != digest:
        raise OSError(errno.EIO, "what was written does not read back: the disk has other bytes", str(path))
    return digest


def digest_on_disk(path: Path) -> str:
    """The SHA-256 of the bytes of a file, read from the disk and not from the page cache where the file system can."""
    found, size = hashlib.sha256(), path.stat().st_size
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffers = [mmap.mmap(-1, _PIECE) for _ in range(2)]
        with _past_the_cache(handle, size), ThreadPoolExecutor(1, "fxc-read") as pool:
            pieces = [memoryview(buffer) for buffer in buffers]
            coming = pool.submit(_whole, os.preadv, handle, pieces[0], 0)
            for start in range(0, size, _PIECE):
                piece = pieces[0][: coming.result()]
                pieces.reverse()
                coming = pool.submit(_whole, os.preadv, handle, pieces[0], start + _PIECE)
                found.update(piece)
    finally:
        os.close(handle)
    return found.hexdigest()


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bytes of tensors one after the other, uint8 [n]."""
    for tensor in tensors:
        for piece in tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).split(_PIECE):
            yield piece
            passed(piece)


def _write(handle: int, pieces: Iterable[Tensor], size: int) -> str:
    """Write `size` bytes, those of `pieces`, and return their SHA-256."""
    found = hashlib.sha256()
    buffers = [mmap.mmap(-1, _PIECE) for _ in range(_BUFFERS if size > _PIECE else 1)]
    written: list[Future | None] = [None] * len(buffers)
    with _past_the_cache(handle, size) as is_past, ThreadPoolExecutor(1, "fxc-write") as pool:
        number = filled = 0

        def full() -> None:
            data, at = memoryview(buffers[number % len(buffers)]), number * _PIECE
            found.update(data[:filled])
            length = filled + (-filled % _BLOCK if is_past else 0)
            written[number % len(buffers)] = pool.submit(_whole, os.pwritev, handle, data[:length], at)

        for piece in pieces:
            while len(piece):
                if filled == _PIECE:
                    full()
                    number, filled = number + 1, 0
                if filled == 0 and (before := written[number % len(buffers)]) is not None:
                    before.result()
                some = piece[: _PIECE - filled]
                torch.frombuffer(buffers[number % len(buffers)], dtype=torch.uint8)[filled : filled + len(some)] = some
                piece, filled = piece[len(some) :], filled + len(some)
        full()
        for each in written:
            if each is not None:
                each.result()
    os.ftruncate(handle, size)
    return found.hexdigest()


@contextlib.contextmanager
def _past_the_cache(handle: int, size: int) -> Iterator[bool]:
    """While open, what is read and written of a file of `size` bytes goes past the page cache; whether it does, and so has to
    be whole blocks."""
    flag, flags = getattr(os, "O_DIRECT", 0), fcntl.fcntl(handle, fcntl.F_GETFL)
    is_past = False
    if size >= _LEAST and flag:
        with contextlib.suppress(OSError):  # a file system of memory
            fcntl.fcntl(handle, fcntl.F_SETFL, flags | flag)
            is_past = True
    try:
        yield is_past
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)


def _whole(move: Callable[[int, list[memoryview], int], int], handle: int, data: memoryview, at: int) -> int:
    """Read or write as much of `data` as there is, from byte `at` of the file on: how many bytes."""
    total = 0
    while total < len(data):
        try:
            count = move(handle, [data[total:]], at + total)
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & getattr(os, "O_DIRECT", 0):
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # larger blocks than there are everywhere
            continue
        if not count:
            break
        total += count
    return total
