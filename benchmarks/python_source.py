"""Python to calibrate on: files of the standard library that the example's held-out text cannot have."""

from __future__ import annotations

import contextlib
import hashlib
import sysconfig
from pathlib import Path

from benchmarks.workloads import PYLM

# A file of the standard library may be in the example's held-out text when its name's hash is 0 modulo this.
HELD_OUT = 16


def python_source(most: int = 1_000_000) -> str:
    """Files of the running Python's standard library, from all over it, none of which the example's held-out text can have.

    By name, as examples/train_pylm.py splits them, and by content, for a file that is there under two names.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = (PYLM / "heldout.txt").read_text(encoding="utf-8")
    sources = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("site-packages/") or "test" in name or may_be_held_out(name):
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if 2_000 < len(text) < 40_000 and text not in held_out:
                sources.append(text)
    step = -(-sum(map(len, sources)) // most)
    return "\n".join(sources[::step])


def may_be_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
