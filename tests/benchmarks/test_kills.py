"""Killed and resumed: kills are counted, and other bytes are found."""

import random

import pytest

from benchmarks import kills
from fxc.artifact.manifest import MANIFEST
from fxc.artifact.spill import JOURNAL


def test_how_far_a_killed_run_had_come(tmp_path):
    out = tmp_path / "out"
    assert kills.place(out) == "before anything was written"
    journal = tmp_path / ".out.fxc-resume" / "0123" / JOURNAL
    journal.parent.mkdir(parents=True)
    journal.write_text('{"key": ""}\n')
    assert kills.place(out) == "before the first part"
    journal.write_text('{"key": ""}\n{"file": "part-00000.safetensors"}\n')
    assert kills.place(out) == "after some parts"
    (tmp_path / ".out.abc").mkdir()
    assert kills.place(out) == "while the artifact was written"
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    assert kills.place(out) == "the artifact was there"


@pytest.mark.parametrize("content", ["same", "other"])
def test_so_many_are_killed_and_other_bytes_are_found(content, tmp_path, monkeypatch):
    moments = []

    def compiled(folder, passes, out, moment):
        if moment is not None and moment < 1e9 and moments.count("killed") < 5:
            moments.append("killed")
            return True
        out.mkdir()
        (out / MANIFEST).write_text("{}")
        (out / "weights").write_text(content if moments else "same")
        return False

    scratch = tmp_path / "runs"
    scratch.mkdir()
    monkeypatch.setattr(kills, "compiled", compiled)
    row = kills.run(tmp_path, "int8", 5, scratch, random.Random(0))
    assert row["kills"] == 5 and row["places"] == {"before anything was written": 5}
    assert row["differ"] == ([] if content == "same" else [["weights"]])
    hardware = {"cpu": "a CPU"}
    report = {"rows": [row], "weights": 1e6, "seed": 0, "hardware": hardware, "versions": {"torch": "1", "python": "3"}}
    assert f"| int8 | 5 | 1 | {int(content == 'other')} |" in kills.markdown(report)
