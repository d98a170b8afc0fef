"""The house's own rules: which room may import which, what is installed, and what a file may not mention."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repo import REPO

# Room -> what it may import of this project, in the order of the road. Every room is here.
ALLOWED = {
    "fxc_kernels": "",
    "fxc.errors": "",
    "fxc.safety": "errors mapped",
    "fxc.neutral": "",
    "fxc.progress": "",
    "fxc.units": "",
    "fxc.memory": "",
    "fxc.mapped": "",
    "fxc.ranks": "errors",
    "fxc.plugins": "errors",
    "fxc.ir": "errors mapped",
    "fxc.schemes": "errors mapped ir fxc_kernels",
    "fxc.source": "errors safety",
    "fxc.data": "errors safety progress ir schemes",
    "fxc.frontend": "errors ir schemes neutral data",
    "fxc.analysis": "errors mapped ir schemes",
    "fxc.calibrate": "errors ranks progress memory ir schemes artifact",
    "fxc.train": "errors progress memory mapped ranks ir schemes data calibrate",
    "fxc.passes": "errors progress memory mapped ranks plugins ir data analysis schemes calibrate train",
    "fxc.verify": "errors safety mapped ir passes schemes",
    "fxc.compilation": "passes train",
    "fxc.artifact": "errors safety mapped plugins ir schemes source data",
    "fxc.lower": "errors mapped ir neutral schemes fxc_kernels",
    "fxc.options": "errors passes source data artifact lower",
    "fxc.pipeline": "errors ranks plugins ir data passes schemes verify compilation options",
    "fxc.export": "errors safety ir schemes source data frontend passes verify artifact lower fxc_kernels",
    "fxc.runtime": "errors ir schemes lower fxc_kernels",
    "fxc.page": "errors units ir schemes analysis calibrate",
    "fxc.parallel": "errors ranks ir schemes analysis passes fxc_kernels",
    "fxc.compiled": "errors safety neutral ranks ir frontend compilation artifact lower export runtime page",
    "fxc.quantizer": "errors ir schemes export compiled",
    "fxc.publish": "errors safety units ir artifact export page",
    "fxc.captured": "errors neutral memory ir source data frontend artifact options",
    "fxc.recipe": "errors",
    "fxc.streaming": "errors ranks mapped memory ir schemes artifact passes options pipeline captured",
    "fxc.compiler": "errors progress neutral ranks ir data schemes analysis calibrate passes compilation pipeline artifact "
    "lower options captured streaming export parallel compiled",
    "fxc.teaching": "errors passes options compiled compiler",
    "fxc.report": "errors units ir data analysis schemes train passes compilation artifact lower compiled fxc_kernels",
    "fxc.measure": "errors neutral progress ir analysis artifact lower source data frontend passes verify compilation options "
    "captured compiler compiled report",
    "fxc.selection": "errors neutral progress units ir schemes analysis source data frontend calibrate passes pipeline lower "
    "options captured recipe compiler compiled measure report",
    "fxc.kernel_bench": "errors ir schemes lower fxc_kernels",
    "fxc.comparison": "errors progress memory units recipe ir analysis source data calibrate passes artifact lower options "
    "captured compiled compiler report measure kernel_bench",
    "fxc.cli": "errors progress safety units ranks plugins ir schemes analysis source data calibrate train passes compilation "
    "artifact options captured lower compiled recipe streaming compiler teaching measure kernel_bench page report comparison "
    "selection publish fxc",
    "fxc.__main__": "cli",
    "fxc": "quantizer errors ir frontend passes options compiled compiler teaching measure comparison selection",
}
SOURCES = sorted(path for room in ("fxc", "kernels") for path in (REPO / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = ("fxc_kernels", *parts[1:]) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """fxc.ir.text -> fxc.ir, fxc_kernels.int8_linear -> fxc_kernels, torch.fx -> torch."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fxc" else parts[0]


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module an import statement names, at any depth of the file, relative ones made absolute."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from fxc import load` imports the module fxc.load: the names may be modules of their own.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "fxc" else {base}
    return found


def breaches(module: str, imported: set[str]) -> list[str]:
    """The imports of `module` that point the wrong way."""
    room = room_of(module)
    allowed = {name if name.startswith("fxc") else f"fxc.{name}" for name in ALLOWED[room].split()}
    ours = {name for name in imported if name.split(".")[0] in {"fxc", "fxc_kernels", "kernels"} and room_of(name) != room}
    return sorted(name for name in ours if room_of(name) not in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_point_one_way(path):
    module = module_name(path)
    imported = imports_of(path.read_text(), module, path.name == "__init__.py")
    assert breaches(module, imported) == []
    if room_of(module) == "fxc_kernels":
        outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "fxc_kernels"}, "kernels/ is a leaf: torch and triton only"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("fxc.ir.text", "def f():\n    from fxc.passes import base", ["fxc.passes"]),
        ("fxc.ir.text", "from ..load import x", ["fxc.load"]),
        ("fxc.ir.text", "from . import check\nfrom fxc.errors import FxcError\nimport torch.fx", []),
        ("fxc.lower.cpu", "import fxc.passes.base as b, fxc_kernels.int8_linear", ["fxc.passes.base"]),
        ("fxc_kernels.int8_linear", "from fxc import ir", ["fxc.ir"]),
        ("fxc.compiler", "import fxc.cli.app, fxc.passes", ["fxc.cli.app"]),
    ],
)
def test_the_import_check_sees_breaches(module, source, wrong):
    assert breaches(module, imports_of(source, module)) == wrong


def test_kernels_is_no_package():
    assert not (REPO / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_kernels_does_not_shadow_hugging_faces_package():
    command = [sys.executable, "-c", "import transformers.models.llama.modeling_llama"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_kernels_is_installed_as_fxc_kernels(tmp_path):
    command = [sys.executable, "-c", "import fxc_kernels, fxc; print(*fxc_kernels.__path__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"run make setup first: {done.stderr}"
    assert str(REPO / "kernels") in done.stdout


def test_every_package_is_listed_for_installation():
    listed = set(tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = sorted({path.parent for path in SOURCES})
    present = {module_name(folder / "__init__.py") for folder in folders}
    assert present == listed, "[tool.setuptools] packages and the folders that hold code differ"
    lacking = [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert [folder for folder in lacking if folder.is_relative_to(REPO / "fxc")] == []


TESTS = sorted((REPO / "tests").rglob("*.py"))


def test_tests_lie_as_what_they_test():
    """tests/<room> is a folder of fxc/, or the tests of kernels/, of benchmarks/, of whole models, and by random input."""
    folders = {path.parent.relative_to(REPO / "tests") for path in TESTS} - {Path("."), Path("helpers")}
    others = {Path("kernels"), Path("benchmarks"), Path("models"), Path("fuzz")}
    assert [str(folder) for folder in sorted(folders - others) if not (REPO / "fxc" / folder).is_dir()] == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPO)))
def test_files_of_tests_are_short_and_import_no_other(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "split it by what it tests"
    others = [name for name in imports_of(text, path.stem) if name.startswith(("test_", "tests", "conftest"))]
    assert others == [], "what tests share is in tests/helpers"


MACHINE = re.compile(
    r"(?<![\w.:/~-])/(?:root|work|home|Users|opt|mnt)/[\w.]"  # absolute paths of one machine
    r"|(?:--|_)(?:extra-)?index[-_]url|--find[-]links|pythonhosted[.]org|arti[f]actory|//(?:localhost|127[.]0)",
    re.IGNORECASE,
)


def test_files_name_no_machine_and_no_package_index():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout, so there is no list of what belongs to the repository")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        path = REPO / name
        # examples/pylm holds text of the standard library, which is not ours to judge.
        if not path.is_file() or path.is_relative_to(REPO / "examples" / "pylm"):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{name}: {match.group()}" for match in MACHINE.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("see /ho" + "me/me/x", True),
        ("pip install --index" + "-url x", True),
        ("https://a.org/home/x", False),
        ("a/wo" + "rk/b", False),
    ],
)
def test_the_machine_check_sees_paths(text, hit):
    assert bool(MACHINE.search(text)) == hit
