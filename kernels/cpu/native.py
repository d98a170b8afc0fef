"""Kernels in C++, the files *.cpp beside this one: built when they are first used, for the instructions that this CPU has.

    <cache folder> / <kernel>-<level>-<hash of source, flags and compiler>.so, and .sha256, of what it is

They have a plain C interface and know nothing of torch, so a build takes seconds. The compiler is $CXX, else the first of c++,
g++ and clang++ that is there; without one, or on a CPU that is none of LEVELS, `NotBuilt` says so and other forms run.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fxc_kernels.cache import folder

LEVELS = {
    "avx512_vnni": (
        "avx512f avx512bw avx512vl avx512dq avx512vnni fma prefer-vector-width=512",
        "avx512_f avx512_bw avx512_vl avx512_dq avx512_vnni",
    ),
    "avx_vnni": ("avx2 avxvnni fma", "avx2 avx_vnni fma3"),
    "avx2": ("avx2 fma", "avx2 fma3"),
}  # fmt: skip
"""Level -> (what the compiler is told, what the CPU must be able to do), the fastest first. $FXC_CPU_LEVEL names the highest
that is used, "none" for no kernel in C++ at all."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-trapping-math", "-ffp-contract=off", "-w")
SECONDS = 300


class NotBuilt(Exception):
    """Why there is no kernel here, in one line."""


def level() -> str:
    """The level that this CPU runs. Raises NotBuilt where it is none, or $FXC_CPU_LEVEL says so."""
    names = list(LEVELS)
    highest = os.environ.get("FXC_CPU_LEVEL") or names[0]
    if highest not in names:
        why = "" if highest == "none" else f", which is none of {', '.join(names)}"
        raise NotBuilt(f"FXC_CPU_LEVEL={highest:.100}{why}")
    for name in names[names.index(highest) :]:
        if set(LEVELS[name][1].split()) <= _abilities():
            return name
    raise NotBuilt(f"this CPU has none of {', '.join(names)}")


@functools.cache
def _abilities() -> frozenset[str]:
    return frozenset(name for name, there in torch.cpu.get_capabilities().items() if there is True)


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler. Raises NotBuilt where there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else (["c++"], ["g++"], ["clang++"]):
        if found := shutil.which(command[0]):
            return (found, *command[1:])
    raise NotBuilt("no C++ compiler: install g++, or set CXX" if not given else f"CXX={given[0]!r:.100} is not there")


def refusal(functions: Callable[[str], object]) -> str | None:
    """Why this machine cannot run the functions of a kernel, made for a level, or None."""
    try:
        functions(level())
    except NotBuilt as error:
        return str(error)
    return None


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers are, as C takes it."""
    return None if tensor is None else tensor.data_ptr()


def library(kernel: str, level: str) -> ctypes.CDLL:
    """The file `kernel`.cpp as a library, built if it has not been yet. Raises NotBuilt."""
    found = _library(kernel, level)
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


@functools.cache
def _library(kernel: str, level: str) -> ctypes.CDLL | str:
    """A failure is remembered too: what was tried once does not cost the next layer seconds."""
    try:
        return _load(kernel, level)
    except (NotBuilt, OSError, subprocess.SubprocessError) as error:
        return f"{kernel} was not built: {error}"[:500]


def _load(kernel: str, level: str) -> ctypes.CDLL:
    command = [*compiler(), *FLAGS, *(f"-m{each}" for each in LEVELS[level][0].split())]
    here = Path(__file__).parent
    source = here / f"{kernel}.cpp"
    version = subprocess.run([command[0], "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    parts = [*(path.read_bytes() for path in (source, *sorted(here.glob("*.h")))), " ".join(command).encode(), version]
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    with _place() as place:
        built = place / f"{kernel}-{level}-{key}.so"
        with _alone(place):
            if not _is_whole(built):
                _build([*command, str(source)], built)
        return ctypes.CDLL(str(built))


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A folder that can be written: the cache, or one for this process, which what is loaded from it outlives."""
    place = folder()
    if place is not None:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            yield place
            return
    with tempfile.TemporaryDirectory(prefix="fxc-") as own:
        yield Path(own)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of processes that want the same kernel one builds it. Where files cannot be locked, each does."""
    with open(place / "build.lock", "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(built: Path) -> bool:
    """Whether the library is there as it was built: to load one that was cut short ends the process."""
    try:
        return _digest_of(built).read_text() == hashlib.sha256(built.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _digest_of(built: Path) -> Path:
    return built.with_suffix(".sha256")


def _build(command: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        made = Path(scratch) / built.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise NotBuilt(next((line for line in done.stderr.splitlines() if "error" in line), f"{command[0]} failed").strip())
        digest = Path(scratch) / "digest"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, built)
        os.replace(digest, _digest_of(built))
