"""Commands in forks: their exit codes, what they print, what they do at their end, and how they are killed."""

import atexit
import os
import signal
import sys
import tempfile
import time
import weakref

import pytest

from benchmarks.fuzz import forked


def _as_main(monkeypatch, act):
    monkeypatch.setattr(forked, "_main", lambda words: act())


def test_a_command_says_its_code_and_what_it_printed():
    assert forked.run(["passes", "--explain", "int8,fp8"])[0] == 2
    code, said = forked.run(["--version"])
    assert code == 0 and "fxc" in said


def test_a_fault_has_a_trace_and_exit_code_1(monkeypatch):
    _as_main(monkeypatch, lambda: {}["missing"])
    code, said = forked.run([])
    assert code == 1 and "KeyError: 'missing'" in said


def test_a_fork_ends_its_own_things_and_no_others(monkeypatch, tmp_path):
    mine, file, kept = tempfile.TemporaryDirectory(dir=tmp_path), tmp_path / "file", []

    class Thing:
        pass

    def act():
        thing = Thing()
        atexit.register(lambda: os.write(1, b"exit "))
        weakref.finalize(thing, file.write_text, "finalized")
        kept.append(thing)
        return 0

    _as_main(monkeypatch, act)
    assert forked.run([], at_exit=lambda: os.write(1, b"end ")) == (0, "end exit ")
    assert file.read_text() == "finalized" and os.path.isdir(mine.name)
    mine.cleanup()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_killed_at_a_moment_or_at_a_write(sent, monkeypatch, tmp_path):
    _as_main(monkeypatch, lambda: time.sleep(60))
    fork = forked.start([])
    with pytest.raises(TimeoutError):
        fork.wait(0.1)
    assert fork.kill(sent)[0] == -sent

    def act():
        for number in range(5):
            (tmp_path / f"{number}").write_text("")
            (tmp_path / f"{number}").rename(tmp_path / f"moved-{number}")
        return 0

    _as_main(monkeypatch, act)
    # Each is opened, then renamed.
    words = ["-o", str(tmp_path / "out")]
    assert forked.run(words, at_write=(7, lambda: os.kill(os.getpid(), sent)))[0] == -sent
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "moved-0", "moved-1", "moved-2"]


def test_what_a_first_run_imports_is_there_for_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(forked, "_main", lambda words: __import__("colorsys") and 0)
    sys.modules.pop("colorsys", None)
    assert forked.warm(["-o", str(tmp_path / "out")]) == (0, "", 0)
    assert "colorsys" in sys.modules and not [*tmp_path.iterdir()]
