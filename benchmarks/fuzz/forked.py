"""Commands of fxc in forks of one process that has imported all that they import: what takes seconds is not repeated, and a
fork can be killed, or do something else than usual at one of its writes to the disk."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path


def warm(words: list[str]) -> tuple[int, str, int]:
    """Run a command, as `run` does, and import here what it imported. The last number: of its writes."""
    seen = Path(words[words.index("-o") + 1]).with_name("imported")
    code, said = run(words, at_exit=lambda: seen.write_text("\n".join([str(_writes), *sys.modules])))
    writes, *names = seen.read_text().splitlines()
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            try:
                __import__(name)
            except ImportError:  # a name that is no file, which a module made up
                continue
    seen.unlink()
    return code, said, int(writes)


def run(words: list[str], **how) -> tuple[int, str]:
    """The exit code of a command (-N: of signal N), and what it printed."""
    return start(words, **how).wait()


class Fork:
    """A command that runs."""

    def __init__(self, number: int, output: int) -> None:
        self.number, self.output = number, output

    def wait(self, seconds: float = float("inf")) -> tuple[int, str]:
        """Raises TimeoutError where it runs longer."""
        until = time.monotonic() + seconds
        while True:
            found, status = os.waitpid(self.number, 0 if seconds == float("inf") else os.WNOHANG)
            if found:
                break
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.002)
        with os.fdopen(self.output, "rb") as file:
            file.seek(0)
            return os.waitstatus_to_exitcode(status), file.read().decode(errors="replace")

    def kill(self, sent: signal.Signals) -> tuple[int, str]:
        os.kill(self.number, sent)
        return self.wait()


def start(
    words: list[str], *, at_write: tuple[int, Callable[[], None]] | None = None, at_exit: Callable[[], object] | None = None
) -> Fork:
    """at_write: (n, what to do just before the n-th write, from 0), where a file beside the output or in it is opened to be
    written or renamed, or any is synced to the disk; at_exit: what to do at the end."""
    output = os.memfd_create("output")
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return Fork(child, output)
    code: object = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        # What this process leaves to its end is not for the fork to do.
        atexit._clear()
        weakref.finalize._registry, weakref.finalize._registered_with_atexit = {}, False
        # As in a process that a shell starts in the foreground.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _watch(str(Path(words[words.index("-o") + 1]).parent) if "-o" in words else "", *(at_write or (-1, None)))
        code = _main(words)
        if at_exit is not None:
            at_exit()
        atexit._run_exitfuncs()
    except BaseException:  # whatever it is, this process ends here, and not where it was forked
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _main(words: list[str]) -> object:
    from fxc.__main__ import main

    sys.argv = ["fxc", *words]
    try:
        main()
    except SystemExit as error:
        return error.code
    return 0


_writes = 0


def _watch(folder: str, at: int, act: Callable[[], None] | None) -> None:
    sync = os.fsync

    def write() -> None:
        global _writes
        _writes += 1
        if _writes == at + 1:
            act()

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "os.rename" or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
        if writes and folder and str(arguments[0]).startswith(folder):
            write()

    def fsync(handle: int) -> None:
        write()
        sync(handle)

    sys.addaudithook(hook)
    os.fsync = fsync
