"""The command line as a whole: help, exit codes, errors as text and as JSON, terminals, interruptions."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from command import fxc
from rich.console import Console
from typer.testing import CliRunner

from fxc.cli.app import app
from fxc.report.console import Output


def test_help_does_not_wait_for_torch():
    code = "import sys, fxc.cli.app; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fxc", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "compile" in done.stdout
    assert time.perf_counter() - before < 5, "half a second on a machine that does nothing else"


def test_wrong_usage_is_2():
    for arguments in (["melt"], ["compile"], ["run", "x", "--max-new-tokens", "0"], ["bench", "x"]):
        fxc(*arguments, code=2)


def test_a_fault_is_one_line_and_the_trace_is_for_those_who_ask(monkeypatch):
    def broken():
        raise RuntimeError("the \x1b[31mworld ended")

    monkeypatch.setattr("fxc.report.machine.examine", broken)
    done = fxc("doctor", code=1)
    assert "error[FXC-E1]: RuntimeError: the world ended" in done.stderr and "FXC_TRACE=1" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("FXC_TRACE", "1")
    assert "Traceback" in fxc("doctor", code=1).stderr


@pytest.mark.fault(28)
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 6), (torch.OutOfMemoryError(), 6)])
def test_interruption_and_lack_of_memory_have_their_codes(monkeypatch, error, code):
    def stop():
        raise error

    monkeypatch.setattr("fxc.report.machine.examine", stop)
    fxc("doctor", code=code)


def test_a_terminal_gets_colours_unless_no_color(monkeypatch):
    def shown() -> str:
        output = Output()
        output.out = Console(file=io.StringIO(), force_terminal=True, width=60)
        output.table("title", ["name", ">bytes"], [("[bold]x[/]\x1b[2J", 3)])
        return output.out.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown()
    assert "[bold]x[/]" in text and "\x1b[2J" not in text and "\x1b[1m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(f"\x1b[{colour}" in shown() for colour in ("3", "38", "9"))


def test_progress_is_a_bar_with_counts_on_a_terminal_one_line_elsewhere_and_nothing_with_json(monkeypatch):
    def shown(terminal: bool, as_json: bool) -> str:
        output = Output(as_json)
        output.err = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with output.doing("compiling"):
            assert list(output.track(iter("abc"), "reading [x]", 3)) == ["a", "b", "c"]
        return output.err.file.getvalue().replace("compiling", "").replace(" ...\n", "")

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(True, False)
    assert "reading [x]" in text and "3/3" in text and "0:00:00" in text
    assert shown(False, False) == "reading [x]"
    assert shown(True, True).count("reading") == shown(False, True).count("reading") == 0


def test_json_mode_keeps_stdout_for_json(capsys):
    with Output(as_json=True) as output:
        print("a stray print")
        output.line("a line")
        output.table("title", ["x"], [(1,)])
        output.json({"value": float("nan")})
    written = capsys.readouterr()
    assert json.loads(written.out) == {"value": None} and "a stray print" in written.err


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["passes", "--explain", "int9"], 2, {"kind": "UsageError", "what": "there is no pass 'int9'"}),
        (["inspect", "no/such/folder/here"], 2, {"kind": "UsageError"}),
        (["run", "x", "--prompt", "a", "--text", "b"], 2, {"kind": "UsageError"}),
        (["eval", "x"], 2, {"what": "there is nothing to measure"}),
        (["compile"], 2, {"what": "Missing argument 'model'.", "where": "fxc compile"}),
        (["compile", "x", "--nope"], 2, {"kind": "UsageError", "where": "fxc compile"}),
        (["run", "x", "--max-new-tokens", "0"], 2, {"kind": "UsageError", "where": "fxc run"}),
        (["bench", "kernels", "--tune"], 2, {"hint": "add --out FOLDER"}),
        (["bench", "melt"], 2, {"where": "fxc bench"}),
        (["melt"], 2, {"where": "fxc"}),
        ([], 2, {"where": "fxc"}),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout(arguments, code, error):
    done = CliRunner().invoke(app, [*arguments, "--json"], prog_name="fxc")
    assert done.exit_code == code and "error" not in done.stderr
    said = json.loads(done.stdout)
    assert list(said) == ["error"] and set(said["error"]) == {"code", "kind", "what", "where", "why", "hint"}
    assert said["error"] == said["error"] | error | {"code": f"FXC-E{code}"}
    if arguments:
        assert done.exit_code == CliRunner().invoke(app, arguments).exit_code


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 6, "ResourceError"),
        (RuntimeError("the world ended"), 1, "FxcError"),
    ],
)
def test_with_json_interruptions_and_faults_are_objects_too(monkeypatch, error, code, kind):
    def stop():
        print("a stray print")
        raise error

    monkeypatch.setattr("fxc.report.machine.examine", stop)
    assert json.loads(fxc("doctor", "--json", code=code).stdout)["error"]["kind"] == kind


def test_an_argument_after_two_dashes_is_no_option():
    assert "error[FXC-E2]" in fxc("inspect", "--", "--json", code=2).stderr


def test_python_m_fxc_reports_errors_the_same_way(tmp_path):
    command = [sys.executable, "-m", "fxc", "eval", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error[FXC-E2]") and done.stdout == ""
