"""What hostile input may not do: start a process, open a connection, import or write where it should not, hang, take memory."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxc.errors import FxcError

SECONDS = 10
BYTES = 1_000_000_000
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "webbrowser.open",
    "urllib.Request", "ftplib.connect", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod",
    "shutil.rmtree", "shutil.move",
)  # fmt: skip


class Broke(AssertionError):
    """Input made fxc do what it may not."""


@dataclass
class _Watch:
    """on: the thread that is being watched, for kernels are built in others; until: when by `own_seconds` it has to be done;
    folder: of the input; seen: what was done. A hook stays for good."""

    on: int | None = None
    until: float = 0.0
    folder: str = ""
    seen: list[str] = field(default_factory=list)
    installed: bool = False

    def hook(self, event: str, arguments: tuple) -> None:
        if self.on != threading.get_ident():
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            # 3: what is not for reading alone. /dev/null is no file.
            if arguments[2] & 3 and str(arguments[0]) != "/dev/null":
                self.seen.append(f"writes {arguments[0]!r}")
        elif event in ("exec", "compile") and self.folder and self.folder in str(arguments[-1]):
            self.seen.append(f"{event} of a file of the input")
        elif event == "import" and self.folder and self.folder in str(arguments[1]):
            self.seen.append(f"import {arguments[0]} from the input")


_WATCH = _Watch()


def own_seconds() -> float:
    """A clock of this thread that stands still while others have the processor that it waits for, and not while it sleeps."""
    return time.monotonic() - int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _expired(*_: Any) -> None:
    left = _WATCH.until - own_seconds()
    if left <= 0:
        # What is read may catch what is raised here.
        _WATCH.seen.append(f"takes more than {SECONDS} seconds")
        raise Broke(f"it took more than {SECONDS} seconds")
    signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What is done in the block that hostile input may not do; raises `Broke` after ten seconds."""
    if not _WATCH.installed:
        sys.addaudithook(_WATCH.hook)
        _WATCH.installed = True
    _WATCH.seen, _WATCH.folder = [], str(folder)
    before = signal.signal(signal.SIGALRM, _expired)
    _WATCH.until = own_seconds() + SECONDS
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _WATCH.on = threading.get_ident()
    try:
        yield _WATCH.seen
    finally:
        _WATCH.on = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Outcome:
    """said: the error, None where it was taken; seconds: how long; grown: bytes by which the process was larger meanwhile."""

    said: str | None
    seconds: float
    grown: int


def judged(folder: Path, read: Callable[[Path], Any]) -> Outcome:
    """Read `folder`, which may be anything. Raises `Broke` unless that works, or is refused with one clear error, with nothing
    executed, in ten seconds and a gigabyte."""
    began, size = time.perf_counter(), _size_from_now()
    said = None
    try:
        with watched(folder) as seen:
            read(folder)
    except FxcError as error:
        if type(error) is FxcError:
            raise Broke(f"a fault of fxc: {error}") from error
        said = str(error)
        if not (error.what and "Traceback" not in said and len(said) < 5000):
            raise Broke(f"the error is not clear: {said[:500]}") from error
    except Broke:
        raise
    except BaseException as error:
        raise Broke(f"{type(error).__name__}: {str(error)[:300]}") from error
    if seen:
        raise Broke(f"it did what it may not: {seen[:3]}")
    grown = _kilobytes("VmHWM") * 1024 - size
    if grown > BYTES:
        raise Broke(f"it took {grown / 1e9:.1f} GB")
    return Outcome(said, time.perf_counter() - began, grown)


def _size_from_now() -> int:
    """The process's bytes, from which its peak is counted anew: an earlier peak would hide this one."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS") * 1024


def _kilobytes(of: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{of}:"))
