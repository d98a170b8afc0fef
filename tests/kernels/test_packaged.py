"""What is linked into AOTInductor packages: functions that torch's generated code can call, or a reason."""

import os
import re
from pathlib import Path

import pytest

from fxc_kernels.cpu import native, native_int4, native_int8, packaged
from fxc_kernels.cpu.ops import NATIVE_INT4_LINEAR
from fxc_kernels.cpu.packaged import KERNELS, linked

PACKAGE = Path(packaged.__file__).parent / "package"
needs_a_level = pytest.mark.skipif(bool(native_int4.why_not()), reason="this CPU runs none of the kernels")


def test_every_operator_has_its_function():
    assert {each.stem for each in PACKAGE.glob("*.cpp")} == set(KERNELS.values())
    for operator, kernel in KERNELS.items():
        source = " ".join((PACKAGE / f"{kernel}.cpp").read_text().split())
        assert packaged._declaration(operator) + " {" in source, "torch would call it with other arguments"
    names = re.search(r"activations\[\] = {(.*?)}", (PACKAGE / "int8_linear.cpp").read_text())[1]
    assert tuple(re.findall(r'"(\w+)"', names)) == native_int8.ACTIVATIONS


@needs_a_level
def test_what_cannot_be_built_is_refused(tmp_path):
    false = tmp_path / "false"
    false.write_text("#!/bin/sh\necho 'error: no space' >&2; exit 1\n")
    false.chmod(0o755)
    before = os.environ.get("LIBRARY_PATH")
    for compiler, said in ((str(false), "no space"), (str(tmp_path / "gone"), "gone")):
        with pytest.raises(native.NotBuilt, match=said), linked([NATIVE_INT4_LINEAR], compiler):
            pass
    assert os.environ.get("LIBRARY_PATH") == before


def test_without_operators_nothing_is_built():
    with linked([], "/nowhere/c++") as settings:
        assert not any(settings.values())
