"""Packages of AOTInductor: torch alone runs them, with neither fxc nor a compiler, and computes the same."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import families
import pytest
import torch
from command import fxc as command

import fxc
from fxc.errors import UsageError
from fxc.export import aoti
from fxc.export.runs import runs
from fxc.ir.observe import run
from fxc.lower.cpu import lower_to_kernels
from fxc.lower.definitions import by_definition
from fxc.verify.compare import relative_error
from fxc_kernels.cpu import native_int4, native_int8
from fxc_kernels.cpu.packaged import KERNELS

ALONE = """
import sys
import torch
package = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([package(torch.load(path))[0] for path in sys.argv[2:]], "out.pt")
assert not [name for name in sys.modules if name.partition(".")[0] in ("fxc", "fxc_kernels", "transformers")]
"""


def compiled(name: str, passes: str, **options) -> fxc.CompiledModel:
    return fxc.optimize(*families.build(name), passes=passes, verify=False, **options)


def generated(package: Path) -> str:
    """The C++ that a package was compiled from."""
    with zipfile.ZipFile(package) as file:
        return "".join(file.read(name).decode() for name in file.namelist() if name.endswith("wrapper.cpp"))


def test_torch_alone_runs_it_at_any_batch(tmp_path):
    """In fxc's kernels where this machine has them, and as the artifact computes in them."""
    model = compiled("mlp", "int4:group=32:only=down,int8")
    model.save(tmp_path / "artifact")
    command("export", tmp_path / "artifact", "-o", tmp_path / "out", "--format", "aoti")
    native = {"int8": native_int8.why_not() is None, "int4": native_int4.why_not() is None}
    for name, is_there in native.items():
        call = re.search(rf"CHECK\(aoti_torch_cpu_native_{name}_linear\(", generated(tmp_path / "out" / "model.pt2"))
        assert bool(call) is is_there
    names = json.loads((tmp_path / "out" / "names.json").read_text())
    assert names["inputs"] == [each.name for each in model.program.signature.inputs]
    given = [torch.randn(batch, 40, generator=torch.Generator().manual_seed(batch)) for batch in (1, 2, 9)]
    for number, x in enumerate(given):
        torch.save(x, tmp_path / f"{number}.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out" / "model.pt2", *(tmp_path / f"{n}.pt" for n in range(3))],
        cwd=tmp_path, env={"PATH": "/nowhere", "CXX": "/nowhere/c++"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for x, found in zip(given, torch.load(tmp_path / "out.pt"), strict=True):
        assert relative_error([found], run(model.program, [x])) < 0.02
        if all(native.values()):
            eager = fxc.load(tmp_path / "artifact", keep_compressed=True)(x)
            assert relative_error([found], [eager]) < 1e-5


def test_layers_go_into_kernels_or_it_says_why_not(monkeypatch):
    model = compiled("qwen2", "int4:group=32:only=re:down_proj,fp8:only=re:o_proj,int8")
    lowered, choices = lower_to_kernels(model.program)
    names = {each.fqn: each.op for each in choices}
    called = [node.target for node in lowered.graph.nodes if node.target in KERNELS]
    if native_int8.why_not() or native_int4.why_not():
        pytest.skip("this CPU runs none of the kernels")
    # Queries, keys and values are one product, gate and up another.
    assert set(names.values()) == {"int8", "int4"} and len(names) == 13 and len(called) == 2 * 3 + 1
    assert not [name for name in names if "o_proj" in name]
    for inputs, expected in runs(model.program):
        assert relative_error(run(by_definition(lowered), inputs), expected) < 0.02
    monkeypatch.setenv("FXC_CPU_LEVEL", "none")
    lowered, choices = lower_to_kernels(model.program)
    assert {(each.op, each.reason.partition(";")[0]) for each in choices} == {("unchanged", "FXC_CPU_LEVEL=none")}
    assert not [node for node in lowered.graph.nodes if node.target in KERNELS]


def test_experts_are_refused(tmp_path):
    for passes, said in (("int8:only=re:experts", "AOTInductor cannot hold it as int8"), ("canonicalize", "holds no fxc")):
        with pytest.raises(UsageError, match=said):
            compiled("mixtral", passes).export_aoti(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler\n(.|\n)*g\+\+"):
        compiled("mlp", "canonicalize").export_aoti(tmp_path / "out")
    assert not any(tmp_path.iterdir()) and aoti.NAME == "model.pt2"
