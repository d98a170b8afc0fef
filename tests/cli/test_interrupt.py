"""Ctrl-C ends the command with one line and exit code 130, also while modules are imported."""

import json
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
sys.argv = ["fxc", "doctor", *{options!r}]
runpy.run_module("fxc", run_name="__main__", alter_sys=True)
"""


@pytest.mark.fault(27)
@pytest.mark.parametrize("module", ["fxc.cli.app", "typer", "torch"])
def test_interruption_while_a_module_is_imported(module):
    done = interrupted_at(module)
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


@pytest.mark.parametrize("module", ["fxc.cli.app", "torch"])
def test_with_json_an_interruption_is_an_object(module):
    done = interrupted_at(module, "--json")
    assert done.returncode == 130 and done.stderr == ""
    assert json.loads(done.stdout) == {"error": {"kind": "Interrupted"}}


def interrupted_at(module: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _INTERRUPT_AT.format(module=module, options=options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
