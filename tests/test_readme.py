"""The README's Python runs, as it stands there, from top to bottom."""

from __future__ import annotations

import re

from repo import REPO

import fxc


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(REPO / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {"__name__": __name__}
    monkeypatch.setattr(fxc.Pass, "registry", dict(fxc.Pass.registry))
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    printed = capsys.readouterr().out
    assert "fxc.int8_linear" in printed and "torch.Size([9, 64])" in printed
    assert "may not change what the program computes" in printed
