"""Kernels in C++ inside an AOTInductor package: their machine code, and the functions of package/*.cpp that torch's generated
code calls in the place of operators, are linked into the package's library. Nothing but torch is needed to run it.

torch knows such functions as `aot_inductor.custom_ops_to_c_shims`: operator -> the declaration of aoti_torch_cpu_<operator>.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from fxc_kernels.cpu import native
from fxc_kernels.cpu.ops import NATIVE_INT4_LINEAR, NATIVE_INT8_LINEAR

_HERE = Path(__file__).parent
KERNELS = {NATIVE_INT8_LINEAR: "int8_linear", NATIVE_INT4_LINEAR: "int4_linear"}
"""Operator -> the kernel that it calls, and the file in package/ through which."""


@contextlib.contextmanager
def linked(operators: Collection[torch._ops.OpOverload], command: str) -> Iterator[dict[str, Any]]:
    """The settings of Inductor by which a package that is compiled inside of the context calls `operators`, keys of KERNELS, in
    the machine code of this CPU's level. command: the C++ compiler. Raises `native.NotBuilt`."""
    with tempfile.TemporaryDirectory(prefix="fxc-") as place:
        try:
            objects = [made for each in sorted(KERNELS[operator] for operator in operators)
                       for made in _objects(each, command, Path(place))]  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise native.NotBuilt(f"the kernels of a package were not built: {error}"[:500]) from error
        with _searched(place):
            yield {
                "aot_inductor.custom_ops_to_c_shims": {each: [_declaration(each)] for each in operators},
                "aot_inductor.custom_op_libs": [f":{each}" for each in objects],
            }


def _objects(kernel: str, command: str, place: Path) -> list[str]:
    """The files of a kernel as objects in `place`, named after what is in them: Inductor keeps what it linked by names."""
    level = native.level()
    machine = [f"-m{each}" for each in native.LEVELS[level][0].split()]
    flags = [each for each in native.FLAGS if each != "-shared"]
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    made = []
    for source in (_HERE / f"{kernel}.cpp", _HERE / "package" / f"{kernel}.cpp"):
        built = place / "built.o"
        done = subprocess.run(
            [command, "-c", "-fvisibility=hidden", *flags, *machine, include, str(source), "-o", str(built)],
            capture_output=True, text=True, timeout=native.SECONDS,
        )  # fmt: skip
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"{command} failed")
            raise native.NotBuilt(said.strip())
        made.append(f"fxc_{source.parent.name}_{kernel}_{native.digest(built.read_bytes())}.o")
        built.rename(place / made[-1])
    return made


@contextlib.contextmanager
def _searched(place: str) -> Iterator[None]:
    """The linker looks for libraries in `place` too: torch takes their names, and no folder."""
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = place if not before else f"{place}:{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def _declaration(operator: torch._ops.OpOverload) -> str:
    """The C function of an operator, as generated code calls it."""
    types = {"Tensor": "AtenTensorHandle", "Optional[Tensor]": "AtenTensorHandle*", "int": "int64_t", "bool": "int32_t",
             "str": "const char*"}  # fmt: skip
    arguments = [f"{types[str(each.type)]} {each.name}" for each in operator._schema.arguments]
    name = operator._schema.name.partition("::")[2]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join([*arguments, 'AtenTensorHandle* made'])})"
