"""The command line, run in this process."""

import json

from typer.testing import CliRunner

from fxc.cli.app import app


def fxc(*arguments: object, code: int = 0):
    """Run the command line in this process and check its exit code."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, f"{done.exit_code}: {done.output}\n{done.exception!r}"
    return done


def fxc_json(*arguments: object) -> dict:
    return json.loads(fxc(*arguments, "--json").stdout)
