"""How the kernels in C++ are built and kept, and what is said where they cannot be."""

import os
import subprocess
import sys

import pytest
from repo import REPO

from fxc_kernels import cache
from fxc_kernels.cpu import native, native_int4

try:
    native.level()
except native.NotBuilt:
    pytest.skip("this CPU runs none of them", allow_module_level=True)

BUILT = "from fxc_kernels.cpu import native_int4; print(native_int4.why_not())"


def said(environment: dict[str, str], program: str = BUILT) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_kernel_is_built_once_and_anew_where_it_is_damaged(tmp_path):
    given = {"FXC_CACHE": str(tmp_path)}
    assert said(given) == "None"
    (built,) = tmp_path.glob("int4_linear-*.so")
    assert native.level() in built.name
    before = built.stat().st_mtime_ns
    assert said(given | {"CXX": ""}) == "None" and built.stat().st_mtime_ns == before
    built.write_bytes(built.read_bytes()[:1000])
    assert said(given) == "None" and built.stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {built.name, f"{built.stem}.sha256", "build.lock"}


@pytest.mark.slow
def test_without_a_place_to_keep_it_a_kernel_is_built_for_the_process(tmp_path):
    assert said({"FXC_CACHE": "off", "TMPDIR": str(tmp_path)}) == "None"
    assert not list(tmp_path.iterdir())


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
def test_where_there_can_be_none_it_says_why(tmp_path, monkeypatch, environment, why):
    kept = (native.compiler, native._library, native_int4._functions)
    for name, value in ({"FXC_CACHE": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    for each in kept:
        each.cache_clear()
    try:
        assert why in native_int4.why_not()
    finally:
        for each in kept:
            each.cache_clear()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FXC_CACHE", raising=False)
    assert cache.folder() == tmp_path / "fxc"
    monkeypatch.setenv("FXC_CACHE", "off")
    assert cache.folder() is None
