"""How much memory this process may still take, as far as Linux says."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

# Of a control group: its limit, what it uses, and what of that the kernel gives back before it kills anybody.
_FILES = (("memory.max", "memory.current", "inactive_file"),
          ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip

# What compiling a model in memory takes: so many times its bytes, and what torch, transformers and gates take of any.
TIMES, BESIDES = 3, 1 << 30


def is_larger(nbytes: int, limit: int | None = None) -> bool:
    """Whether to compile a model of so many bytes takes more than `limit` bytes, or else more than there are."""
    left = available() if limit is None else limit
    return left is not None and TIMES * nbytes + BESIDES > left


def available(root: Path = Path("/")) -> int | None:
    """Bytes: the least of what the machine has, what control groups (of both versions) leave of their limits, and `ulimit -v`.
    None where there is no /proc that says it. root: where /proc and /sys are."""
    found = [*_of_the_machine(root), *_of_control_groups(root), *_of_the_process(root)]
    return max(min(found), 0) if found else None


def _of_the_machine(root: Path) -> Iterator[int]:
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE):
        yield int(found[1]) * 1024


def _of_control_groups(root: Path) -> Iterator[int]:
    """Of the groups that the process is in, and of those around them. In a container its own group is the root."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        for mount in (mounts / "memory",) if controllers else (mounts, mounts / "unified"):
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield from _left_in(folder)


def _left_in(folder: Path) -> Iterator[int]:
    for limit, used, reclaimable in _FILES:
        most, now = _read(folder / limit).strip(), _read(folder / used).strip()
        # "max" is no limit.
        if most.isdecimal() and now.isdecimal():
            found = re.search(rf"^{reclaimable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            yield int(most) - int(now) + (int(found[1]) if found else 0)


def _of_the_process(root: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read(root / "proc/self/statm").split()
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0]) * resource.getpagesize()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
