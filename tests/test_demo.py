"""`make demo` and the other scripts of examples run to their ends: they are the first thing that anybody sees."""

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


def test_a_compiled_model_in_transformers():
    command = [sys.executable, "examples/in_transformers.py", "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=600)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(":", 1) for line in done.stdout.splitlines())
    first, streamed, loaded = (each.strip() for each in told.values())
    assert first == streamed and len(first) > 8 and list(told)[1].startswith("streamed in ") and loaded[:8] == first[:8]
