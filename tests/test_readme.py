"""The Python of README and guides runs as it stands there, from top to bottom; the pages build without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from repo import REPO

import fxc
from fxc.schemes.scheme import SCHEMES, unregister

GUIDES = sorted(path for path in (REPO / "docs").rglob("*.md") if "```python" in path.read_text())


def run_blocks(path, tmp_path, monkeypatch):
    """Run the blocks of a page in a folder that has the examples, and forget the passes and formats that they define."""
    (tmp_path / "examples").symlink_to(REPO / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    names: dict = {"__name__": __name__}
    known = set(SCHEMES)
    monkeypatch.setattr(fxc.Pass, "registry", dict(fxc.Pass.registry))
    try:
        for block in blocks:
            exec(compile(block, path.name, "exec", dont_inherit=True), names)
    finally:
        for name in SCHEMES.keys() - known:
            unregister(SCHEMES[name])
    return blocks


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    assert len(run_blocks(REPO / "README.md", tmp_path, monkeypatch)) >= 4
    printed = capsys.readouterr().out
    assert "fxc.int8_linear" in printed and "torch.Size([9, 64])" in printed
    assert "may not change what the program computes" in printed


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_guides_run(path, tmp_path, monkeypatch):
    assert run_blocks(path, tmp_path, monkeypatch)


def test_there_are_guides_with_code():
    assert {"first-model", "writing-a-pass", "writing-a-format"} <= {path.stem for path in GUIDES}


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs; make docs builds them too")
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path / "site"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fxc push" in (tmp_path / "site" / "command-line" / "index.html").read_text()
    assert "keep_float" in (tmp_path / "site" / "api" / "index.html").read_text()
