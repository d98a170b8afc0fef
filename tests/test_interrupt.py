"""Ctrl-C ends the command with one line and exit code 130, also while modules are imported."""

import subprocess
import sys

import pytest

_INTERRUPT_AT = """
import runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["fxc", "doctor"]
runpy.run_module("fxc", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["fxc.cli", "typer", "torch"])
def test_interruption_while_a_module_is_imported(module):
    command = [sys.executable, "-c", _INTERRUPT_AT.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"
