"""A cell of the table in a process of its own: what it gives, when it crashes, and when it takes too long."""

import os
import signal
import time

import pytest

from benchmarks.exports.apart import apart
from benchmarks.exports.text import _cell


def gives(value, scratch):
    return {"status": "agrees", "why": f"{value}", "is_empty": not any(scratch.iterdir())}


def dies(scratch):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(marker, scratch):
    if not os.fork():
        time.sleep(4)
        open(marker, "w").close()
        os._exit(0)
    time.sleep(60)


def raises(scratch):
    raise ValueError("of the tool")


def test_what_it_gives():
    assert apart(gives, 3, limit=60).items() >= {"status": "agrees", "why": "3", "is_empty": True}.items()


@pytest.mark.parametrize(("work", "why"), [(dies, "its process died (SIGSEGV)"), (raises, "ValueError: of the tool")])
def test_a_crash_is_a_cell(work, why):
    found = apart(work, limit=60)
    assert (found["status"], found["why"]) == ("failed", why)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    found = apart(hangs, str(tmp_path / "marker"), limit=1)
    assert (found["status"], found["why"]) == ("failed", "it ran for more than 1 s")
    time.sleep(4)
    assert not any(tmp_path.iterdir())


def test_what_other_versions_gave_is_marked():
    known = {"torch": "2", "onnx": "1"}
    cells = [{"status": "agrees"} | more for more in ({}, {"versions": {"torch": "2"}}, {"versions": {"torch": "1"}})]
    assert [_cell(each, {}, known) for each in cells] == ["yes", "yes", "yes\\*"]
