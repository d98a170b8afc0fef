"""Numbers as people write them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes in powers of ten: 1234567 -> "1.23 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"


def ratio(after: float, before: float) -> str:
    return f"x{after / before:.3f}" if before else "-"
