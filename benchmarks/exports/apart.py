"""A cell in a process of its own, which may crash, hang or fill the memory without taking the others with it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")


def ready(*modules: str) -> None:
    """Let the processes have these imported already."""
    _CONTEXT.set_forkserver_preload(list(modules))


def apart(work: Callable[..., dict[str, Any]], *given: Any, limit: float) -> dict[str, Any]:
    """What `work(*given, scratch)` returns, an empty folder behind the rest, with "seconds"; {"status": "failed", "why": ...}
    where its process died or took longer than `limit` seconds, and was ended with all that it had started."""
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        process = _CONTEXT.Process(target=_work, args=(theirs, work, given, scratch), daemon=True)
        process.start()
        theirs.close()
        try:
            found = mine.recv() if mine.poll(limit) else {"status": "failed", "why": f"it ran for more than {limit:g} s"}
        except EOFError:
            process.join(10)
            found = {"status": "failed", "why": f"its process died ({_how(process.exitcode)})"}
        finally:
            _end(process)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def code() -> str:
    """What says whether fxc or its kernels have changed since a cell was run."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ("fxc", "kernels") for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _work(sender: Connection, work: Callable[..., dict[str, Any]], given: tuple, scratch: str) -> None:
    os.setsid()  # so that compilers that it starts can be ended with it
    try:
        found = work(*given, Path(scratch))
    except BaseException as error:
        traceback.print_exc()
        found = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    sender.send(found)


def _how(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"


def _end(process: Any) -> None:
    try:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass
    process.join()
