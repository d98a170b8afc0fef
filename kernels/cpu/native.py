"""Kernels in C++, the files *.cpp beside this one: built when they are first used, for the instructions that this CPU has.

    <cache folder> / <kernel>-<level>-<hash of source and flags>-<hash of compiler>.so, and .sha256, of what it is

They have a plain C interface and know nothing of torch, so a build takes seconds. All are built side by side as soon as one is
wanted, or `start` is called. The compiler is $CXX, else the first of c++, g++ and clang++ that is there; without one what
another compiler built of the same source serves (`build_all`, in an image). Where there is nothing, or the CPU is none of
LEVELS, `NotBuilt` says so and other forms run.
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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

_HERE = Path(__file__).parent
KERNELS = sorted(source.stem for source in _HERE.glob("*.cpp"))


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


class Running:
    """Of the models that run at once in threads of this process, each takes its share of the threads: see `threads`."""

    def __enter__(self) -> None:
        global _running
        with _COUNT:
            _running += 1

    def __exit__(self, *error: object) -> None:
        global _running
        with _COUNT:
            _running -= 1


_running = 0
_COUNT = threading.Lock()


def threads() -> int:
    """How many a kernel takes: torch's number of them, divided among the models that run now. It changes no number."""
    return max(torch.get_num_threads() // max(_running, 1), 1)


def start() -> None:
    """Begin to build what this machine can run of the kernels, and do not wait. Nothing happens where it can run none."""
    with contextlib.suppress(NotBuilt):
        _begun(level())


def library(kernel: str, level: str) -> ctypes.CDLL:
    """The file `kernel`.cpp as a library, when it is built; all others are built meanwhile. Raises NotBuilt."""
    found = _begun(level)[kernel].result()
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


def linear_functions(kernel: str, level: str, weights: tuple) -> tuple[Callable, Callable]:
    """`<kernel>_scratch` and `<kernel>`, for `linear`. weights: the C types of what is the kernel's own."""
    found = library(kernel, level)
    at, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    scratch, function = getattr(found, f"{kernel}_scratch"), getattr(found, kernel)
    scratch.restype, scratch.argtypes = long, (long, long, number)
    function.restype, function.argtypes = None, (at, number, long, long, long, number, *weights, at, at, number)
    return scratch, function


def linear(functions: tuple[Callable, Callable], x: torch.Tensor, outputs: int, how: int, *weights: object) -> torch.Tensor:
    """x [..., K] float32 or bfloat16 -> [..., outputs] in its dtype. how: the number that the kernel takes beside the sizes."""
    scratch, function = functions
    columns, x = x.shape[-1], x.contiguous()
    rows = x.numel() // columns if columns else 0
    y = x.new_empty(*x.shape[:-1], outputs)
    if rows and outputs:
        space = torch.empty(scratch(rows, columns, how), dtype=torch.uint8, device=x.device)
        function(
            x.data_ptr(), x.dtype == torch.bfloat16, rows, columns, outputs, how, *weights, y.data_ptr(), space.data_ptr(),
            threads(),
        )  # fmt: skip
    return y


def build_all() -> dict[str, dict[str, Path]]:
    """Level -> kernel -> its library in the cache folder, of all LEVELS, whatever this CPU is: for an image or an installation.
    Raises NotBuilt where one cannot be built, and where nothing is kept."""
    place = folder()
    if place is None:
        raise NotBuilt("FXC_CACHE=off keeps nothing")
    compiler()
    made: dict[str, dict[str, Path]] = {}
    for each in LEVELS:
        with ThreadPoolExecutor(len(KERNELS)) as pool:
            paths = pool.map(lambda kernel, level=each: _kept(kernel, level, place), KERNELS)
            made[each] = dict(zip(KERNELS, paths, strict=True))
    return made


def _kept(kernel: str, level: str, place: Path) -> Path:
    with _attempted(kernel), _file(kernel, level) as built:
        if built.parent != place:
            raise NotBuilt(f"{place} cannot be written")
        return built


_BEGUN: dict[str, dict[str, Future]] = {}
_LOCK = threading.Lock()


def _begun(level: str) -> dict[str, Future]:
    """The libraries of all kernels, being built: a thread waits for each compiler. A failure is a result too: what was tried
    once does not cost the next layer seconds."""
    with _LOCK:
        if level not in _BEGUN:
            pool = ThreadPoolExecutor(len(KERNELS), "fxc-build")
            _BEGUN[level] = {kernel: pool.submit(_load, kernel, level) for kernel in KERNELS}
            pool.shutdown(wait=False)
        return _BEGUN[level]


def _before_fork() -> None:
    """A forked process has none of the threads that build, and would hold their pipes open: builds end first."""
    _LOCK.acquire()
    wait([future for begun in _BEGUN.values() for future in begun.values()])


os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def _load(kernel: str, level: str) -> ctypes.CDLL | str:
    try:
        with _attempted(kernel), _file(kernel, level) as built:
            return ctypes.CDLL(str(built))
    except NotBuilt as error:
        return str(error)


@contextlib.contextmanager
def _attempted(kernel: str) -> Iterator[None]:
    try:
        yield
    except (NotBuilt, OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"{kernel} was not built: {error}"[:500]) from error


@contextlib.contextmanager
def _file(kernel: str, level: str) -> Iterator[Path]:
    """The library, built unless it is in the cache folder. What is kept nowhere is gone afterwards."""
    source = _HERE / f"{kernel}.cpp"
    flags = [*FLAGS, *(f"-m{each}" for each in LEVELS[level][0].split())]
    code = digest(*(path.read_bytes() for path in (source, *sorted(_HERE.glob("*.h")))), " ".join(flags).encode())
    try:
        command = compiler()
    except NotBuilt:
        found = [] if folder() is None else sorted(folder().glob(f"{kernel}-{level}-{code}-*.so"))
        whole = next(filter(_is_whole, found), None)
        if whole is None:
            raise
        yield whole
        return
    version = subprocess.run([command[0], "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    name = f"{kernel}-{level}-{code}-{digest(' '.join(command).encode(), version)}.so"
    with kept(name, f"{kernel}-{level}.lock", functools.partial(_build, [*command, *flags, str(source)])) as built:
        yield built


@contextlib.contextmanager
def kept(name: str, lock: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A file of the cache folder, which `make` writes unless it is there as it was written. Where nothing can be kept it is
    gone afterwards."""
    if folder() is not None and _is_whole(folder() / name):
        yield folder() / name
        return
    with _place() as place:
        with _alone(place / lock):
            if not _is_whole(place / name):
                with tempfile.TemporaryDirectory(dir=place) as scratch:
                    made, digest = Path(scratch) / name, Path(scratch) / "digest"
                    make(made)
                    digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
                    os.replace(made, place / name)
                    os.replace(digest, _digest_of(place / name))
        yield place / name


def sources() -> str:
    """A hash of the code of all kernels."""
    return digest(*(path.read_bytes() for kind in ("*.cpp", "*.h") for path in sorted(_HERE.rglob(kind))))


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


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
def _alone(lock: Path) -> Iterator[None]:
    """Of processes that want the same kernel one builds it. Where files cannot be locked, each does."""
    with open(lock, "w") as file:
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


def _build(command: list[str], made: Path) -> None:
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise NotBuilt(next((line for line in done.stderr.splitlines() if "error" in line), f"{command[0]} failed").strip())
