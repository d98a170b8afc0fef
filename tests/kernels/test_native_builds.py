"""How the kernels in C++ are built: side by side, once for all processes, by a compiler that need not be there or succeed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repo import REPO

from fxc_kernels import cache

# Writes a line for each kernel, waits until as many are there as $TOGETHER says, and makes a library that says 7. The kernel
# that $FAILS names has an error.
COMPILER = """#!/bin/bash
if [ "$1" = --version ]; then echo "of a test"; exit; fi
source="${@: -3:1}" out="${@: -1}"
echo "$(basename "$source")" >> "$LOG"
for turn in $(seq 200); do
    [ "$(wc -l < "$LOG")" -ge "${TOGETHER:-1}" ] && break
    sleep 0.05
done
[ "$(wc -l < "$LOG")" -ge "${TOGETHER:-1}" ] || { echo "x.cpp:1: error: built alone" >&2; exit 1; }
[ "$(basename "$source")" = "$FAILS.cpp" ] && { echo "x.cpp:1: error: of the test" >&2; exit 1; }
cp "$MADE" "$out"
"""
NAMES = ["attention", "between", "int4_linear", "int4_quantize", "int8_linear", "int8_quantize", "int8_rows"]
SEVENS = str([7] * len(NAMES))
SAID = "from fxc_kernels.cpu import native, native_int4; print(native_int4.why_not())"
SEVEN = "from fxc_kernels.cpu import native; print([native.library(k, 'avx_vnni').seven() for k in native.KERNELS])"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A library that any kernel's may be taken for, and the compiler that gives it."""
    if not (compiler := shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    place = tmp_path_factory.mktemp("made")
    source = place / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(place / "seven.so")], check=True)
    (place / "c++").write_text(COMPILER)
    (place / "c++").chmod(0o755)
    return place


@pytest.fixture
def given(made, tmp_path):
    """The environment of a process whose compiler is that one."""
    log = tmp_path / "log"
    log.touch()
    cxx = {"CXX": str(made / "c++"), "MADE": str(made / "seven.so"), "LOG": str(log)}
    return cxx | {"FXC_CACHE": str(tmp_path / "cache"), "FXC_CPU_LEVEL": ""}


def process(environment: dict[str, str], program: str) -> subprocess.Popen:
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd=REPO, env=os.environ | environment)


def said(environment: dict[str, str], program: str = SAID) -> str:
    running = process(environment, program)
    out, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    return out.strip()


def built(given: dict[str, str]) -> list[str]:
    return sorted(line.removesuffix(".cpp") for line in Path(given["LOG"]).read_text().split())


def test_all_kernels_are_built_side_by_side(given):
    """The compiler gives none before it was started for all of them."""
    assert said(given | {"TOGETHER": str(len(NAMES))}, SEVEN) == SEVENS
    assert built(given) == NAMES


def test_to_start_does_not_wait(given):
    program = f"""
import time
from fxc_kernels.cpu import native
native.LEVELS = {{"avx_vnni": ("avx2", "")}}
before = time.perf_counter()
native.start()
print(time.perf_counter() - before < 1)
while {len(NAMES)} > len(open({given["LOG"]!r}).readlines()):
    time.sleep(0.02)
open({given["LOG"]!r}, "a").write("go\\n")
{SEVEN}"""
    assert said(given | {"TOGETHER": "5"}, program).split("\n") == ["True", SEVENS]


@pytest.mark.fault(29)
def test_of_processes_that_begin_at_once_one_builds(given):
    running = [process(given, SEVEN) for _ in range(3)]
    assert [each.communicate(timeout=120)[0].strip() for each in running] == [SEVENS] * 3
    assert built(given) == NAMES
    assert said(given, SEVEN) == SEVENS and built(given) == NAMES


def test_one_that_fails_is_tried_once_and_leaves_the_others(given):
    program = """
from fxc_kernels.cpu import native
for kernel in ("int4_linear", "between", "int4_linear"):
    try:
        print(native.library(kernel, "avx_vnni").seven())
    except native.NotBuilt as error:
        print(error)"""
    why = "int4_linear was not built: x.cpp:1: error: of the test"
    assert said(given | {"FAILS": "int4_linear"}, program).split("\n") == [why, "7", why]
    assert built(given) == NAMES
    assert not list(Path(given["FXC_CACHE"]).glob("int4_linear-*.so")) and said(given, SEVEN) == SEVENS


def test_a_process_that_is_forked_while_kernels_are_built_has_them(given):
    program = f"""
import os
from fxc_kernels.cpu import native
native._begun("avx_vnni")
child = os.fork()
if child:
    print(os.waitpid(child, 0)[1], flush=True)
else:
    {SEVEN.replace("print", "assert " + SEVENS + " == ").replace("; ", chr(10) + "    ")}
    os._exit(0)"""
    assert said(given, program) == "0"


@pytest.mark.fault(29)
def test_a_damaged_library_is_built_anew(given, made):
    assert said(given, SEVEN) == SEVENS
    cache_folder = Path(given["FXC_CACHE"])
    (library,) = cache_folder.glob("int4_linear-*.so")
    library.write_bytes(library.read_bytes()[:1000])
    assert said(given, SEVEN) == SEVENS and built(given) == sorted([*NAMES, "int4_linear"])
    assert library.read_bytes() == (made / "seven.so").read_bytes()
    assert {path.suffix for path in cache_folder.iterdir()} == {".so", ".sha256", ".lock"}


def test_what_was_built_before_serves_without_a_compiler_and_is_only_read(given):
    """As in an image that has none, whose cache belongs to somebody else."""
    assert said(given, SEVEN) == SEVENS
    without = given | {"CXX": "", "PATH": "/nowhere"}
    assert said(without, SEVEN) == SEVENS
    for lock in Path(given["FXC_CACHE"]).glob("*.lock"):
        lock.unlink()
    assert said(given, SEVEN) == said(without, SEVEN) == SEVENS
    assert not list(Path(given["FXC_CACHE"]).glob("*.lock")) and built(given) == NAMES
    (library,) = Path(given["FXC_CACHE"]).glob("between-*.so")
    library.write_bytes(b"")
    tried = "from fxc_kernels.cpu import native; print(native._begun('avx_vnni')['between'].result())"
    assert "no C++ compiler" in said(without, tried)


def test_without_a_place_to_keep_it_a_kernel_is_built_for_the_process(given, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert said(given | {"FXC_CACHE": "off", "TMPDIR": str(scratch)}, SEVEN) == SEVENS
    assert not list(scratch.iterdir()) and built(given) == NAMES


def test_all_levels_are_built_for_an_image(given):
    program = "from fxc_kernels.cpu import native; print({k: sorted(v) for k, v in native.build_all().items()})"
    levels = dict.fromkeys(("avx512_vnni", "avx_vnni", "avx2"), NAMES)
    assert said(given, program) == str(levels) and built(given) == sorted(3 * NAMES)
    assert said(given, program) == str(levels) and len(built(given)) == 3 * len(NAMES)
    refused = "from fxc_kernels.cpu import native\ntry: native.build_all()\nexcept native.NotBuilt as error: print(error)"
    assert said(given | {"FXC_CACHE": "off"}, refused) == "FXC_CACHE=off keeps nothing"
    assert said(given | {"CXX": "no-such-compiler"}, refused) == "CXX='no-such-compiler' is not there"
    failed = given | {"FAILS": "between", "FXC_CACHE": given["FXC_CACHE"] + "2"}
    assert said(failed, refused) == "between was not built: x.cpp:1: error: of the test"


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "no-such-compiler"}, "CXX='no-such-compiler' is not there"),
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler: install g++, or set CXX"),
        ({"CXX": "false"}, "was not built"),
        ({"FXC_CPU_LEVEL": "none"}, "FXC_CPU_LEVEL=none"),
        ({"FXC_CPU_LEVEL": "sse"}, "FXC_CPU_LEVEL=sse, which is none of avx512_vnni"),
    ],
)
def test_where_there_can_be_none_it_says_why(tmp_path, environment, why):
    assert why in said({"FXC_CACHE": str(tmp_path)} | environment)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FXC_CACHE", raising=False)
    assert cache.folder() == tmp_path / "fxc"
    monkeypatch.setenv("FXC_CACHE", "off")
    assert cache.folder() is None
