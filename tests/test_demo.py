"""`make demo` runs to its end: it is the first thing that anybody sees."""

import subprocess
import sys

import pytest
from repo import REPO


@pytest.mark.slow
def test_the_demo_measures_reloads_and_writes(tmp_path):
    command = [sys.executable, "examples/demo.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "layers: " in done.stdout and "tokens in" in done.stdout + done.stderr
