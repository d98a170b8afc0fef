"""The wheel: everything that runs is in it, and it runs from elsewhere. Version and pins agree, each said once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from repo import REPO

import fxc

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since building writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("fxc", "kernels"):
        shutil.copytree(REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / file, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_everything_that_runs_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        for room, inside in (("fxc", "fxc"), ("kernels", "fxc_kernels")):
            files = [p for p in (REPO / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
            for path in files:
                name = (Path(inside) / path.relative_to(REPO / room)).as_posix()
                assert name in names and opened.read(name) == path.read_bytes(), name
        assert any(name.endswith(".cpp") for name in names) and any(name.endswith("LICENSE") for name in names)
        entry = next(opened.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "fxc = fxc.__main__:main" in entry and wheel.name.startswith(f"fxc-{fxc.__version__}-")


def test_it_runs_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    lines = [
        "import fxc, fxc_kernels, torch, sys", "from fxc_kernels.cpu import native",
        "print(fxc.__file__, native.__file__, *[p for p in fxc_kernels.__path__][:1])",
        "made = fxc.optimize(torch.nn.Linear(64, 64), (torch.randn(4, 64),), 'int8')", "made.save('out')",
        "x = torch.randn(3, 64)", "assert torch.equal(fxc.load('out')(x), made(x))",
        "print(open('out/report.html').read().count('<html') == 1)",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert all(path.startswith(str(tmp_path / "site")) for path in first.split()) and second == "True"
    asked = subprocess.run(
        [sys.executable, "-m", "fxc", "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert asked.stdout.strip() == f"fxc {fxc.__version__}"


def test_the_version_is_said_once():
    assert PROJECT["project"]["dynamic"] == ["version"] and metadata.version("fxc") == fxc.__version__
    said = re.findall(r"^## (\d\S*)", (REPO / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert said[0] == fxc.__version__


def test_what_is_pinned_is_what_is_asked_for():
    """Every dependency has a lower bound in pyproject.toml and, but for the benchmarks' peers, a version in constraints.txt."""
    pinned = {}
    for line in (REPO / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            (each,) = requirement.specifier
            assert each.operator == "==", line
            pinned[requirement.name.lower()] = each.version
    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + [each for name, extra in extras.items() if name != "bench" for each in extra]
    for each in map(Requirement, asked):
        assert each.specifier and each.name.lower() in pinned, each
        assert each.specifier.contains(pinned[each.name.lower()], prereleases=True), each
