"""Constants stored small and without loss, as in Deep Compression (Han et al., arXiv 1510.00149): places, values, codes.

A coded constant is a row of bytes: a head, then streams, each as it is or deflated (zlib, as a rule its Huffman codes alone).

    head      layout u8, then for each stream: coder u8, stored bytes u32, bytes u32                    little-endian
    places    of what is not zero: nothing where all is stored, a bitmap (numpy.packbits), or steps: a byte a number, how many
              zeros come before it, 255 for 255 zeros and no number
    values    of the numbers that are stored: the book of up to 256 values and a byte each that says which; or, where there are
              more, all their first bytes, all their second bytes, ...

Numbers go row by row or column by column, whatever is smaller, and are bit patterns: what is read is what was written, to the
bit. The manifest says the dtype and shape of each: no stream may give more bytes than they need, and no constant becomes more
than `LARGEST` times as large.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fxc.errors import InputRefused

LARGEST = 256
"""A coded constant is at least one part in so many of its size, filled up where that is needed: a file can ask for so much
memory and no more."""
_PLACES = ("all", "bitmap", "steps")
_STREAM = struct.Struct("<BII")
_STORED, _DEFLATED = 0, 1
_ALWAYS = 1 << 12
# Of a constant of more numbers than this, the layout is chosen by its begin.
_TRIED = 1 << 20
_SKIP = 255
# With a larger share of numbers that are not zero it does not pay to tell their places.
_CROWDED = 0.95
_BOOK = 256


def coded(tensor: Tensor) -> Tensor | None:
    """The bytes uint8 [n] of a constant of any dtype and shape; None where they would not be fewer than it has."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes or nbytes >= 1 << 32:
        return None
    numbers = _patterns(tensor)
    tried = numbers[: max(1, _TRIED // max(1, math.prod(numbers.shape[1:])))]
    best = min(filter(None, (_written(tried, layout) for layout in _layouts(numbers))), key=len)
    if best is not None and len(tried) < len(numbers):
        # The whole may have more values than a book holds.
        places, by_book, by_column = _layout(best[0])
        best = _written(numbers, (places, by_book, by_column)) or _written(numbers, (places, False, by_column))
    best = best.ljust(_least(nbytes), b"\0")
    return torch.frombuffer(bytearray(best), dtype=torch.uint8) if len(best) < nbytes else None


def expanded(stored: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The constant that `coded` made `stored` uint8 [n] of. Raises InputRefused where it is not of that dtype and shape."""
    like = torch.empty(0, dtype=dtype)
    count = math.prod(shape)
    nbytes = count * like.element_size()
    if stored.dtype != torch.uint8 or stored.dim() != 1 or not 0 < nbytes < 1 << 32 or len(stored) < _least(nbytes):
        raise InputRefused("a coded constant cannot be so large", why=f"{len(stored):,} bytes for {dtype}{list(shape)}")
    rows = shape[0] if len(shape) > 1 else 1
    try:
        found = _read(stored.numpy().tobytes(), count, like.element_size(), rows)
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise InputRefused("a coded constant is damaged", why=error) from None
    return torch.from_numpy(found.view(np.uint8)).view(dtype).view(shape)


def _least(nbytes: int) -> int:
    return -(-max(0, nbytes - _ALWAYS) // LARGEST)


def _patterns(tensor: Tensor) -> np.ndarray:
    """The numbers as unsigned integers [rows, columns, element bytes -> one integer or, of 16 bytes, two]."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    size = tensor.element_size()
    numbers = flat.view(_unsigned(size))
    return numbers.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def _unsigned(size: int) -> np.dtype:
    return np.dtype(f"<u{min(size, 8)}")


def _layout(byte: int) -> tuple[int, bool, bool]:
    return byte & 3, bool(byte & 4), bool(byte & 8)


def _layouts(numbers: np.ndarray) -> Iterator[tuple[int, bool, bool]]:
    """Those to try: for bytes no book, and the order only where places are told."""
    for places, by_book, by_column in product(range(len(_PLACES)), (False, True), (False, True)):
        is_matrix = min(numbers.shape) > 1
        if not (by_book and numbers.itemsize == 1) and not (by_column and (places == 0 or not is_matrix)):
            yield places, by_book, by_column


def _written(numbers: np.ndarray, layout: tuple[int, bool, bool]) -> bytes | None:
    """`numbers` [rows, columns] in one layout (places, by a book, by column); None where it holds no such."""
    places, by_book, by_column = layout
    flat = (numbers.T if by_column else numbers).reshape(-1)
    streams = []
    if _PLACES[places] != "all":
        used = flat != 0
        if used.mean() > _CROWDED:
            return None
        streams.append(np.packbits(used) if _PLACES[places] == "bitmap" else _steps(used))
        flat = flat[used]
    if by_book:
        book, which = _book(flat)
        if book is None:
            return None
        streams += [book.view(np.uint8), which.astype(np.uint8)]
    else:
        planes = flat.view(np.uint8).reshape(-1, flat.itemsize)
        streams += [planes[:, at] for at in range(flat.itemsize)]
    head, body = bytearray([places | by_book << 2 | by_column << 3]), b""
    for stream in streams:
        raw = np.ascontiguousarray(stream).tobytes()
        coder, made = _deflated(raw)
        head += _STREAM.pack(coder, len(made), len(raw))
        body += made
    return bytes(head) + body


def _book(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """The values in `flat`, if they are few, and which of them each number is."""
    if len(np.unique(flat[:_TRIED])) > _BOOK:
        return None, None
    book, which = np.unique(flat, return_inverse=True)
    return (book, which.reshape(-1)) if len(book) <= _BOOK else (None, None)


def _steps(used: np.ndarray) -> np.ndarray:
    """bool [n] -> uint8: how many zeros come before each number that is used, 255 for 255 of them."""
    zeros = np.diff(np.flatnonzero(used), prepend=-1) - 1
    ends = np.cumsum(zeros // _SKIP + 1)
    steps = np.full(ends[-1] if len(ends) else 0, _SKIP, dtype=np.uint8)
    steps[ends - 1] = zeros % _SKIP
    return steps


def _deflated(raw: bytes) -> tuple[int, bytes]:
    best = _STORED, raw
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        coder = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
        made = coder.compress(raw) + coder.flush()
        best = min(best, (_DEFLATED, made), key=lambda each: len(each[1]))
    return best


def _read(data: bytes, count: int, size: int, rows: int) -> np.ndarray:
    places, by_book, by_column = _layout(data[0])
    if data[0] > 15 or places >= len(_PLACES):
        raise ValueError(f"there is no layout {data[0]}")
    number = _unsigned(size)
    count, columns = count * size // number.itemsize, count * size // number.itemsize // rows
    has_places = _PLACES[places] != "all"
    streams = _streams(data, has_places + (2 if by_book else number.itemsize), max(count, _BOOK * 8))
    used = None
    if has_places:
        stream = next(streams)
        used = np.unpackbits(stream, count=count).astype(bool) if _PLACES[places] == "bitmap" else _used(stream, count)
        if len(used) != count:
            raise ValueError(f"{len(used)} places for {count} numbers")
    stored = count if used is None else int(used.sum())
    if by_book:
        book = next(streams).view(number)
        values = book[next(streams)]
    else:
        planes = list(streams)
        if any(len(plane) != stored for plane in planes):
            raise ValueError(f"{stored} numbers were to come")
        values = np.stack(planes, axis=1).reshape(-1).view(number)
    if len(values) != stored:
        raise ValueError(f"{len(values)} numbers, and {stored} were to come")
    flat = values
    if used is not None:
        flat = np.zeros(count, dtype=number)
        flat[used] = values
    return np.ascontiguousarray(flat.reshape(columns, rows).T).reshape(-1) if by_column else flat


def _streams(data: bytes, number: int, most: int) -> Iterator[np.ndarray]:
    """The streams one after the other, none of them of more than `most` bytes."""
    at = 1 + number * _STREAM.size
    for head in range(1, at, _STREAM.size):
        coder, length, nbytes = _STREAM.unpack_from(data, head)
        if coder not in (_STORED, _DEFLATED) or nbytes > most or at + length > len(data):
            raise ValueError("a stream is longer than it can be")
        raw = data[at : at + length]
        if coder == _DEFLATED:
            decoder = zlib.decompressobj(-zlib.MAX_WBITS)
            raw = decoder.decompress(raw, max(nbytes, 1))
        if len(raw) != nbytes:
            raise ValueError(f"a stream has {len(raw)} bytes and not {nbytes}")
        yield np.frombuffer(raw, dtype=np.uint8)
        at += length


def _used(steps: np.ndarray, count: int) -> np.ndarray:
    """`_steps` undone: bool [count]. Raises ValueError where they lead past the end."""
    is_number = steps != _SKIP
    ends = np.cumsum(steps.astype(np.int64) + is_number)
    places = ends[is_number] - 1
    if len(places) and places[-1] >= count:
        raise ValueError("a place lies past the end")
    used = np.zeros(count, dtype=bool)
    used[places] = True
    return used
